"""Writing a checkpoint: every process its own stages, the first one the meta data and the rename that makes it real."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from pipeoptim.checkpoint.manifest import META, Meta, TornError, digest, folder_name, read_meta
from pipeoptim.checkpoint.stage_files import stage_file, write_stage


class CheckpointGroup(Protocol):
    """The processes that write together."""

    @property
    def is_first(self) -> bool: ...
    def barrier(self) -> None: ...
    def gather(self, value: Any) -> list[Any]: ...


def save(
    root: Path,
    step: int,
    states: Mapping[int, Mapping[str, Any]],
    *,
    config: str,
    group: CheckpointGroup,
    keep: int,
    versions: Mapping[str, str],
) -> Path:
    """Write the checkpoint of ``step`` below ``root``; every process of ``group`` calls it with its own stages.

    Args:
        root: folder of the checkpoints.
        states: stage -> ``stage_state_dict(stage)``.
        config: fingerprint of the configuration.
        keep: complete checkpoints to keep, this one included; older ones are removed.

    Returns:
        Its folder. When this returns on any process, it is complete, and on the disk.
    """
    final, temporary = root / folder_name(step), root / f".{folder_name(step)}.tmp"
    if group.is_first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    group.barrier()
    written: dict[str, tuple[int, str]] = {}
    for k, state in states.items():
        written[stage_file(k)] = _write_stage(temporary / stage_file(k), state)
    files = {name: entry for part in group.gather(written) for name, entry in part.items()}
    if group.is_first:
        meta = Meta(step=step, config=config, stages=len(files), files=files, versions=dict(versions))
        _write_text(temporary / META, meta.to_json())
        _sync(temporary)
        _put_in_place(temporary, final)
        _prune(root, step, keep)
    group.barrier()
    return final


def _write_stage(path: Path, state: Mapping[str, Any]) -> tuple[int, str]:
    write_stage(path, state)
    return digest(path)


def _write_text(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make the names in a folder durable (where the system can)."""
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


def _put_in_place(temporary: Path, final: Path) -> None:
    """Rename; a torn checkpoint of the same step that was in the way is moved aside first, then removed."""
    aside = final.with_name(f".{final.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if final.exists():
        final.rename(aside)
    temporary.rename(final)
    _sync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _prune(root: Path, step: int, keep: int) -> None:
    """Remove the oldest ones: folders without readable meta data are not counted, and those of later steps not touched."""
    complete = []
    for folder in sorted(root.glob("step-*")):
        try:
            found = read_meta(folder).step
        except TornError:
            continue
        if found <= step:
            complete.append((found, folder))
    for _, folder in sorted(complete)[:-keep]:
        shutil.rmtree(folder, ignore_errors=True)
