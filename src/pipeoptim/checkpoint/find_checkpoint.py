"""Reading checkpoints: the newest one that can be resumed from, and what was wrong with the newer ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeoptim.checkpoint.manifest import Meta, OtherFormatError, TornError, verify
from pipeoptim.checkpoint.stage_files import read_stage, stage_file
from pipeoptim.errors import ConfigError


@dataclass(frozen=True)
class Found:
    """The newest checkpoint to resume from, if any, and the newer ones that are not complete, or not finite, with the reason."""

    folder: Path | None
    meta: Meta | None
    torn: tuple[tuple[Path, str], ...]
    sick: tuple[tuple[Path, str], ...] = ()


def find(root: Path, sickness: Callable[[Path, Meta], str | None] = lambda _folder, _meta: None) -> Found:
    """The newest complete checkpoint below ``root``; all sums of it are verified.

    Args:
        sickness: why a complete checkpoint is not to be resumed from; None where nothing is wrong.

    Raises:
        ConfigError: a newer one was written by another version; to pass over it would be to lose what it holds.
    """
    torn: list[tuple[Path, str]] = []
    sick: list[tuple[Path, str]] = []
    for folder in newest_first(root):
        try:
            meta = verify(folder)
        except OtherFormatError as error:
            raise ConfigError(
                f"checkpoint {folder} was written by {error.age} version of pipeoptim ({error}); resume with that version, or move the "
                "checkpoint away to resume from the one before it"
            ) from error
        except TornError as reason:
            torn.append((folder, str(reason)))
            continue
        what = sickness(folder, meta)
        if what is None:
            return Found(folder, meta, tuple(torn), tuple(sick))
        sick.append((folder, what))
    return Found(None, None, tuple(torn), tuple(sick))


def newest_first(root: Path) -> list[Path]:
    """What is called like a checkpoint below ``root``."""
    # By length first: steps beyond 999999 have more digits than folder names are padded to.
    return sorted(root.glob("step-*"), key=lambda path: (len(path.name), path.name), reverse=True)


def load_stage(folder: Path, k: int) -> dict[str, Any]:
    """The state of stage ``k``, on the CPU."""
    return read_stage(folder / stage_file(k))
