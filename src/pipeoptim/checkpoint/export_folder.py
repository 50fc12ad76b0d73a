"""A folder that processes fill together: written beside its place, and given its name when it is complete."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from pipeoptim.checkpoint.saving_group import SavingGroup
from pipeoptim.errors import ConfigError
from pipeoptim.files import cause_of, make_folder, replace_folder, sync_tree


def check_folder(folder: Path, processes: SavingGroup, overwrite: bool, known_by: str) -> None:
    """Refuse, in all processes alike, a folder that could not be written; nothing is left behind.

    Args:
        overwrite: whether an earlier one of the same kind is replaced.
        known_by: a file that every folder of this kind has.

    Raises:
        ConfigError: ``folder`` exists and is not to be replaced, or nothing can be made in the folder above it.
    """
    refusal = _refusal(folder, overwrite, known_by) if processes.is_first else ""
    for reason in filter(None, processes.gather(refusal)):
        raise ConfigError(reason)


def begin_folder(folder: Path, processes: SavingGroup, overwrite: bool, known_by: str) -> Path:
    """The folder beside ``folder`` that is renamed when complete; every process gets the error if there is one.

    Raises:
        ConfigError: as :func:`check_folder`, or it cannot be made.
    """
    refusal, part = "", folder.parent / f".{folder.name}.part"
    if processes.is_first:
        refusal = _refusal(folder, overwrite, known_by)
    try:
        if processes.is_first and not refusal:
            shutil.rmtree(part, ignore_errors=True)
            make_folder(part)
    except OSError as error:
        refusal = f"{folder} cannot be made ({cause_of(error)}); choose another folder"
    for reason in filter(None, processes.gather(refusal)):
        raise ConfigError(reason)
    return part


def finish_folder(part: Path, folder: Path, processes: SavingGroup) -> None:
    """Give a complete folder its name; it is on the disk, under that name, when this returns in any process."""
    processes.barrier()
    if processes.is_first:
        sync_tree(part)  # before the name: it must never stand for files that a power cut has emptied
        replace_folder(part, folder)
    processes.barrier()


def _refusal(folder: Path, overwrite: bool, known_by: str) -> str:
    if folder.exists() and not overwrite:
        return f"{folder} exists already; choose another folder, remove it, or replace it with overwrite=True"
    # Whatever else is there was not written by an earlier call: a slip in the path must not cost a folder of the user's.
    if folder.exists() and not (folder / known_by).is_file():
        return f"{folder} exists already and holds no {known_by}, so it is not replaced; choose another folder, or remove it"
    above = next(path for path in folder.absolute().parents if path.exists())
    try:
        # Tried and not asked: of a full disk, a file system that is read-only or one like /proc, permissions say nothing.
        os.rmdir(tempfile.mkdtemp(prefix=".pipeoptim-", dir=above))
    except OSError as error:
        return f"{folder} cannot be made, for nothing can be made in {above} ({cause_of(error)}); choose another folder"
    return ""
