"""Files that a command is asked to write."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeoptim.errors import ConfigError


def check_new_files(wanted: Mapping[str, Path | None]) -> None:
    """Each is new, in a folder that exists.

    Args:
        wanted: the option that asks for a file -> its path, or None.

    Raises:
        ConfigError: it is there already, its folder is not, or two options name the same.
    """
    asked: dict[Path, str] = {}
    for option, path in wanted.items():
        if path is None:
            continue
        if path.exists():
            raise ConfigError(f"{path} exists; choose another file for {option}")
        if not path.parent.is_dir():
            raise ConfigError(f"the folder {path.parent} does not exist; make it, or choose another file for {option}")
        if path in asked:
            raise ConfigError(f"{path} is asked for by {asked[path]} as well; choose another file for {option}")
        asked[path] = option
