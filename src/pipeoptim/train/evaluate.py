"""Validation through the pipeline itself, which returns the loss; metrics are computed where the loss is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pipeoptim.engine.pipeline import Pipeline
from pipeoptim.train.setup import RunSetup, Task


class ObservedLoss:
    """The task's loss; while ``observed`` is a list, the task's metrics of every call are appended to it."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.observed: list[dict[str, float]] | None = None

    def __call__(self, output: Any, target: Any) -> Tensor:
        if self.observed is not None:
            self.observed.append(self.task.metrics(output, target))
        return self.task.loss(output, target)


def evaluate(pipe: Pipeline, setup: RunSetup, loss: ObservedLoss, drain: bool) -> tuple[float, dict[str, float]] | None:
    """Mean loss and metrics over the validation batches; None where the last stage is not in this process.

    With ``drain=False`` mini-batches stay in flight, so that validating does not change what is trained; each stage then
    uses the latest weights it has. Every process of the run must call it at the same step.
    """
    first, last = 0 in pipe.local_stages, pipe.depth - 1 in pipe.local_stages
    # The loss runs inside the pipeline, so metrics are taken where it is called.
    loss.observed = []
    losses: list[float] = []
    if drain:
        pipe.drain()
    for x, y in setup.validation:
        value = pipe.eval_step(*((x,) if first else ()), target=y if last else None, drain=False)
        if value is not None:
            losses.append(float(value))
    observed, loss.observed = loss.observed, None
    if not last:
        return None
    return _mean(losses), {name: _mean([row[name] for row in observed]) for name in (observed[0] if observed else {})}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
