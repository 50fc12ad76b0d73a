"""Where tables are printed: the terminal, as wide as it is, or a file or pipe, which has no width of its own."""

import os

from rich.console import Console

WIDTH_OF_FILES = 160
"""Columns of text where a table does not go to a terminal."""


def table_console(width: int = WIDTH_OF_FILES) -> Console:
    """A console for tables, ``width`` columns wide where it is no terminal and ``COLUMNS`` does not say otherwise."""
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = width
    return console
