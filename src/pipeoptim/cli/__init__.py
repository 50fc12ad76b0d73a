"""The command line: ``pipeoptim <command>``. One file per command in ``pipeoptim.cli.commands``."""

from pipeoptim.cli.app import main

__all__ = ["main"]
