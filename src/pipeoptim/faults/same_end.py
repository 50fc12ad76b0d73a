"""What two runs must have alike at their ends, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipeoptim.checkpoint import find, load_stage
from pipeoptim.errors import ConfigError
from pipeoptim.telemetry.metrics import Row, read_rows


def end_of(run: Path) -> tuple[list[Row], list[dict[str, Any]]]:
    """All rows without what a clock has measured, and all that the last checkpoint holds, by stage."""
    rows = [
        {key: value for key, value in row.items() if key != "samples_per_second"} for row in read_rows(run / "metrics.jsonl")
    ]
    return [row for row in rows if "timing" not in row], last_states(run)


def last_states(run: Path) -> list[dict[str, Any]]:
    """All that the last checkpoint holds, by stage.

    Raises:
        ConfigError: there is none.
    """
    found = find(run / "checkpoints")
    if found.folder is None or found.meta is None:
        raise ConfigError(f"run {run} has no checkpoint to compare")
    return [load_stage(found.folder, k) for k in range(found.meta.stages)]


def same(one: Any, other: Any) -> bool:
    """Bit for bit."""
    if isinstance(one, torch.Tensor):
        if not isinstance(other, torch.Tensor) or one.dtype != other.dtype or one.shape != other.shape:
            return False
        return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)
