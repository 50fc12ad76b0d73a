"""Reading checkpoints: the newest one that is complete, and what was wrong with the newer ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeoptim.checkpoint.manifest import Meta, TornError, verify
from pipeoptim.checkpoint.stage_files import read_stage, stage_file


@dataclass(frozen=True)
class Found:
    """The newest complete checkpoint, if any, and the newer ones that are not complete, with the reason."""

    folder: Path | None
    meta: Meta | None
    torn: tuple[tuple[Path, str], ...]


def find(root: Path) -> Found:
    """The newest complete checkpoint below ``root``; all sums of it are verified."""
    torn: list[tuple[Path, str]] = []
    for folder in sorted(root.glob("step-*"), key=lambda path: (len(path.name), path.name), reverse=True):
        try:
            return Found(folder, verify(folder), tuple(torn))
        except TornError as reason:
            torn.append((folder, str(reason)))
    return Found(None, None, tuple(torn))


def load_stage(folder: Path, k: int) -> dict[str, Any]:
    """The state of stage ``k``, on the CPU."""
    return read_stage(folder / stage_file(k))
