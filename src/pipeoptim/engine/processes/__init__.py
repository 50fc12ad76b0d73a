"""What the processes of a pipeline agree on and share: connections, liveness, exchanges per update."""
