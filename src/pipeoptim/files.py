"""Files that are whole or absent, and on the disk when they are said to be: what a power cut leaves is never half a file."""

from __future__ import annotations

import os
from pathlib import Path


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


def cause_of(error: OSError) -> str:
    """What went wrong and where, in a few words.

    >>> import errno
    >>> cause_of(OSError(errno.ENOSPC, "No space left on device", "runs/x/metrics.jsonl"))
    'no space left on device: runs/x/metrics.jsonl'
    """
    reason = error.strerror or str(error) or type(error).__name__
    where = "" if error.filename is None else f": {os.fsdecode(error.filename)}"
    return f"{reason[:1].lower()}{reason[1:]}{where}"
