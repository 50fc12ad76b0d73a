"""``python -m pipeoptim`` is ``pipeoptim``."""

from pipeoptim.cli import main

if __name__ == "__main__":
    main()
