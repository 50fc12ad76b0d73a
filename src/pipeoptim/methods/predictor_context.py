"""What a predictor of one stage is made for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pipeoptim.rules import Predictor
from pipeoptim.schedule import Program


class ErrorMonitor(Protocol):
    """Measures predictions against the weights that came (see :meth:`pipeoptim.Emulator.prediction_error`)."""

    def figures(self) -> Sequence[Any]: ...


@dataclass(frozen=True)
class PredictorContext:
    """The stage that a predictor works for. Live information that a new kind of prediction needs is one more field here.

    Attributes:
        optimizer: of the stage.
        program, stage: its action program, and which stage of it.
        scheduler: of the optimizer, if it has one.
        kind: of prediction, as the user chose it.
        fused: "auto" where a kernel may step and predict in one pass; False where every step must be torch's own.
        shards: what this process holds of a parameter, where that is not all of it.
        monitor: what measures the predictions, if anything does.
    """

    optimizer: Optimizer
    program: Program
    stage: int
    scheduler: LRScheduler | None = None
    kind: str = "refined"
    fused: Literal["auto", False] = "auto"
    shards: Mapping[Tensor, Tensor] = field(default_factory=dict)
    monitor: ErrorMonitor | None = None

    def rule_predictor(self) -> Predictor:
        """What predicts by the update rule of the optimizer."""
        return Predictor(self.optimizer, kind=self.kind, scheduler=self.scheduler, fused=self.fused, shards=self.shards)
