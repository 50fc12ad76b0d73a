"""Files that a command is asked to write."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from pipeoptim.errors import ConfigError


def check_new_files(wanted: Mapping[str, Path | None]) -> None:
    """Each is new, in a folder that exists and can be written to: told before anything is measured.

    Args:
        wanted: the option that asks for a file -> its path, or None.

    Raises:
        ConfigError: it is there already, its folder is not or is closed, or two options name the same.
    """
    asked: dict[Path, str] = {}
    for option, path in wanted.items():
        if path is None:
            continue
        if path.exists():
            raise ConfigError(f"{path} exists; choose another file for {option}")
        if not path.parent.is_dir():
            raise ConfigError(f"the folder {path.parent} does not exist; make it, or choose another file for {option}")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise ConfigError(
                f"nothing can be written to the folder {path.parent}; make it writable, or choose another file for {option}"
            )
        if path in asked:
            raise ConfigError(f"{path} is asked for by {asked[path]} as well; choose another file for {option}")
        asked[path] = option
