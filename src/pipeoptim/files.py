"""Files that are whole or absent, and on the disk when they are said to be: what a power cut leaves is never half a file."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeoptim.errors import ConfigError


def write_durably(path: Path, text: str) -> None:
    """Write ``text`` beside ``path`` and rename, so that no reader sees half of it; on the disk when this returns.

    Raises:
        OSError: no space, no permission.
    """
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        sync_file(file.fileno())
    part.replace(path)
    sync_folder(path.parent)


def as_path(name: str, value: Any) -> Path:
    """What a user gave as the argument ``name``, as a path.

    Raises:
        ConfigError: it is no text and no path, or a path that nothing can have.
    """
    if not isinstance(value, (str, Path)):
        raise ConfigError(f"{name} is {value!r}, must be a path, for example 'runs/mine'")
    path = Path(value)
    try:
        path.exists()
    except PermissionError as error:
        raise ConfigError(
            f"{name} is {str(value)!r}, in a folder that is closed to you; make it accessible, or choose another one"
        ) from error
    except (OSError, ValueError) as error:  # too long, or with a zero byte in it
        raise ConfigError(f"{name} is {str(value)[:40]!r}..., which can be no path ({error}); choose another one") from error
    return path


def read_text(path: Path) -> str:
    """What a file holds that a user named. A pipe may be read; a device may have no end (/dev/zero fills the memory).

    Raises:
        OSError: there is no such file, or it is a device.
        ValueError: it is not UTF-8.
    """
    if path.is_char_device() or path.is_block_device():
        raise OSError(errno.EINVAL, "Is a device, must be a file", str(path))
    return path.read_text(encoding="utf-8")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        OSError: as :func:`read_text`.
        ConfigError: it holds something else.
    """
    try:
        data = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deeply
        raise ConfigError(f"{path} is damaged ({error}); restore it") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} is damaged (it holds a {type(data).__name__} and no JSON object); restore it")
    return data


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """The block reads what this library wrote below ``folder``: where an entry is missing or of another kind, the files are damaged.

    Raises:
        ConfigError: so it is; names the folder and what was found.
    """
    try:
        yield
    except ConfigError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ConfigError(
            f"the files in {folder} are damaged ({type(error).__name__}: {error}); restore them, or make them again in another folder"
        ) from error


def sync_file(descriptor: int) -> None:
    """The content of an open file reaches the disk."""
    os.fsync(descriptor)


def sync_path(path: Path) -> None:
    """The content of a file that somebody else has written reaches the disk."""
    with path.open("rb") as file:
        sync_file(file.fileno())


def sync_folder(folder: Path) -> None:
    """The names in a folder reach the disk. Without this a new or renamed file may be gone after a power cut, its content written or
    not. Some file systems cannot, and are left alone."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """All files below ``folder``, which others have written, and all names."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            sync_path(path)
        elif path.is_dir():
            sync_folder(path)
    sync_folder(folder)


def make_folder(folder: Path) -> None:
    """Make ``folder`` and those above it that are missing, all of them durable."""
    missing = []
    above = folder
    while not above.exists():
        missing.append(above)
        above = above.parent
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync_folder(made.parent)


def replace_folder(temporary: Path, final: Path) -> None:
    """Give a complete folder its name; one that has the name already is moved aside first, then removed."""
    aside = final.with_name(f".{final.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if final.exists():  # a folder that is not empty cannot be replaced by a rename
        final.rename(aside)
    temporary.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def cause_of(error: OSError) -> str:
    """What went wrong and where, in a few words.

    >>> import errno
    >>> cause_of(OSError(errno.ENOSPC, "No space left on device", "runs/x/metrics.jsonl"))
    'no space left on device: runs/x/metrics.jsonl'
    """
    reason = error.strerror or str(error) or type(error).__name__
    where = "" if error.filename is None else f": {os.fsdecode(error.filename)}"
    return f"{reason[:1].lower()}{reason[1:]}{where}"
