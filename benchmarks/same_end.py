"""What two runs must have alike at their ends, bit for bit; for benchmarks that disturb one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipeoptim.checkpoint import find, load_stage


def last_states(run: Path) -> list[dict[str, Any]]:
    """All that the last checkpoint holds, by stage."""
    found = find(run / "checkpoints")
    assert found.folder is not None and found.meta is not None
    return [load_stage(found.folder, k) for k in range(found.meta.stages)]


def same(one: Any, other: Any) -> bool:
    """Bit for bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)
