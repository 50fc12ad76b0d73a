"""Two runs are equal when their weights are, bit for bit, and everything else that the next step depends on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exactly import assert_equal
from pipeoptim.checkpoint import find, load_stage
from pipeoptim.config import TrainConfig
from pipeoptim.telemetry.metrics import Row, read_rows
from pipeoptim.train import run


def final_states(where: Path) -> tuple[int, list[dict[str, Any]]]:
    """Step and stage states of the newest checkpoint."""
    found = find(where / "checkpoints")
    assert found.folder is not None
    assert found.meta is not None
    return found.meta.step, [load_stage(found.folder, k) for k in range(found.meta.stages)]


def assert_same_state(one: Path, other: Path, memory: bool = True) -> None:
    """Weights, optimizers, schedulers, random numbers, versions, predictors; with ``memory`` also the copies of weights needed."""
    step, states = final_states(one)
    other_step, other_states = final_states(other)
    assert step == other_step
    assert len(states) == len(other_states)
    for k, (state, other_state) in enumerate(zip(states, other_states, strict=True)):
        if not memory:
            del state["most_copies"], other_state["most_copies"]
        assert_equal(state, other_state, f"stage {k}")


def timeless(where: Path) -> list[Row]:
    """The rows of metrics.jsonl without the speed."""
    return [
        {key: value for key, value in row.items() if key != "samples_per_second"}
        for row in read_rows(where / "metrics.jsonl")
        if "timing" not in row
    ]


def assert_equal_to_undisturbed(where: Path, config: TrainConfig, whole: Path) -> None:
    """The run in ``where`` has ended as that of ``config`` which nobody disturbs, emulated in ``whole``."""
    run(config, whole, progress=False)
    assert_same_state(where, whole)
    assert timeless(where) == timeless(whole)
