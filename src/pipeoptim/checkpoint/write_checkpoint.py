"""Writing a checkpoint: every process writes its stages, the first one the metadata; its rename of the folder makes it valid."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pipeoptim.checkpoint.manifest import META, Meta, TornError, digest, folder_name, read_meta
from pipeoptim.checkpoint.stage_files import stage_file, write_stage
from pipeoptim.errors import PipeOptimError
from pipeoptim.files import cause_of, make_folder, replace_folder, write_durably

T = TypeVar("T")


class CheckpointWriteError(PipeOptimError, OSError):
    """A checkpoint could not be written: no space, no permission. The ones before it are as they were."""


class CheckpointGroup(Protocol):
    """The processes that write together."""

    @property
    def is_first(self) -> bool: ...
    def once(self, work: Callable[[], Any]) -> list[Any]: ...


def save(
    root: Path,
    step: int,
    states: Mapping[int, Mapping[str, Any]],
    *,
    config: str,
    group: CheckpointGroup,
    keep: int,
    versions: Mapping[str, str],
    counts: Callable[[int], bool] = lambda _step: True,
) -> Path:
    """Write the checkpoint of ``step`` below ``root``; every process of ``group`` calls it with its own stages.

    Args:
        root: folder of the checkpoints.
        states: stage -> ``stage_state_dict(stage)``.
        config: fingerprint of the configuration.
        keep: complete checkpoints to keep, this one included; older ones are removed.
        counts: whether the checkpoint of a step is one of those; others are neither counted nor removed.

    Returns:
        Its folder. When this returns on any process, it is complete, and on the disk.

    Raises:
        CheckpointWriteError: in all processes, with the cause of the first that could not write.
    """
    final, temporary = root / folder_name(step), unfinished(root, step)

    def begin() -> None:
        if group.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
            make_folder(temporary)

    def complete(files: dict[str, tuple[int, str]]) -> None:
        if not group.is_first:
            return
        if temporary.exists():  # else a process whose place this one has taken died after the rename
            make_valid(root, step, files, config, versions)
        prune(root, step, keep, counts)

    _together(group, final, begin)
    written = _together(
        group, final, lambda: {stage_file(k): _write_stage(temporary / stage_file(k), state) for k, state in states.items()}
    )
    files = {name: entry for part in written for name, entry in part.items()}
    _together(group, final, lambda: complete(files))
    return final


def _together(group: CheckpointGroup, final: Path, work: Callable[[], T]) -> list[T]:
    """What ``work`` returned in every process, after all have done it. Where it fails in one, all of them raise with its reason: the
    others would otherwise wait for that one, and end with a reason of their own."""
    failure: OSError | None = None

    def attempt() -> tuple[T | None, str | None]:
        nonlocal failure
        try:
            return work(), None
        except OSError as error:
            failure = error
            return None, cause_of(error)

    # Gathered also after a failure: the others are in this call and would wait for ever.
    answers = group.once(attempt)
    raise_cause(final, [reason for _, reason in answers], failure)
    return [value for value, _ in answers]


def _write_stage(path: Path, state: Mapping[str, Any]) -> tuple[int, str]:
    write_stage(path, state)
    return digest(path)


def unfinished(root: Path, step: int) -> Path:
    """The folder in which the checkpoint of ``step`` is written."""
    return root / f".{folder_name(step)}.tmp"


def unfinished_checkpoints(root: Path) -> list[Path]:
    """The folders of those that are being written, or that a process has left behind when it died."""
    return list(root.glob(unfinished(root, 0).name.replace(folder_name(0), "step-*")))


def make_valid(root: Path, step: int, files: dict[str, tuple[int, str]], config: str, versions: Mapping[str, str]) -> None:
    """Complete the checkpoint whose ``files``, of all processes, are written. Its rename makes it one; only then may older ones go."""
    meta = Meta(step=step, config=config, stages=len(files), files=files, versions=dict(versions))
    write_durably(unfinished(root, step) / META, meta.to_json())
    replace_folder(unfinished(root, step), root / folder_name(step))


def raise_cause(final: Path, causes: Iterable[str | None], failure: Exception | None) -> None:
    """Raises CheckpointWriteError with the first of ``causes``, one of each process, that is one."""
    for cause in causes:
        if cause is not None:
            raise CheckpointWriteError(
                f"checkpoint {final} cannot be written ({cause}); the checkpoints before it are kept, so make room or give permission "
                "and resume"
            ) from failure


def prune(root: Path, step: int, keep: int, counts: Callable[[int], bool]) -> None:
    """Remove the oldest ones: folders without readable meta data are not counted, and those of later steps not touched."""
    complete = []
    for folder in sorted(root.glob("step-*")):
        try:
            found = read_meta(folder).step
        except TornError:
            continue
        if found == step or (found < step and counts(found)):
            complete.append((found, folder))
    for _, folder in sorted(complete)[:-keep]:
        shutil.rmtree(folder, ignore_errors=True)
