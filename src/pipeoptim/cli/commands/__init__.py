"""One module per command: ``<name>.py`` defines the function ``<name>``. A new command is a new file here."""
