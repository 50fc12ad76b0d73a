"""Files that a command is asked to write."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path

from pipeoptim.errors import ConfigError


def check_new_files(wanted: Mapping[str, Path | None], drawn: Collection[str] = ()) -> None:
    """Each is new, in a folder that exists and can be written to: told before anything is measured.

    Args:
        wanted: the option that asks for a file -> its path, or None.
        drawn: those of the options whose file becomes an SVG.

    Raises:
        ConfigError: it is there already, its folder is not or is closed, its ending is of another format, or two options name the same.
    """
    asked: dict[Path, str] = {}
    for option, path in wanted.items():
        if path is None:
            continue
        if option in drawn and path.suffix.lower() != ".svg":
            raise ConfigError(
                f"{option} is {str(path)!r}, but draws an SVG; give it that ending, as {path.with_suffix('.svg')}"
            )
        check_writable(path.parent, option)
        if path.exists():
            raise ConfigError(f"{path} exists; choose another file for {option}")
        if path in asked:
            raise ConfigError(f"{path} is asked for by {asked[path]} as well; choose another file for {option}")
        asked[path] = option


def check_writable(folder: Path, option: str) -> None:
    """Raises ConfigError where ``folder``, in which ``option`` asks for a file, is missing or closed to this user."""
    if not folder.is_dir():
        raise ConfigError(f"the folder {folder} does not exist; make it, or choose another file for {option}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(
            f"nothing can be written to the folder {folder}; make it writable, or choose another file for {option}"
        )
