"""What a stage asks of clipping, whatever the rule: :class:`Clip` by one norm, :class:`AdaGC` tensor by tensor."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from pipeoptim.engine.stage.adagc import AdaGC
from pipeoptim.engine.stage.clip import Clip
from pipeoptim.engine.stage.clipped_stage import ClippedStage
from pipeoptim.errors import ConfigError
from pipeoptim.rules import ClipEstimate
from pipeoptim.schedule import Program


class ClipRule(Protocol):
    """How the gradients of an update are clipped: the value of the option ``clip``."""

    @property
    def exchanges(self) -> bool:
        """Whether stages exchange norms."""
        ...

    @property
    def waits(self) -> bool:
        """Whether an update waits for the other stages."""
        ...

    def check(self, program: Program) -> None:
        """Raises ConfigError where what it needs is not there when an update of ``program`` needs it."""
        ...

    def check_tied(self) -> None:
        """Raises ConfigError where it would scale the copies of a tied weight by different numbers."""
        ...

    def clipper(self, stage: ClippedStage) -> StageClipper:
        """What carries it out on ``stage``."""
        ...


class StageClipper(Protocol):
    """Clips the gradients of one stage.

    Attributes:
        used: the norm of the newest update that it has scaled; None before the first.
    """

    used: Tensor | float | None

    @property
    def rule(self) -> ClipRule:
        """What it carries out."""
        ...

    @property
    def scaled_tensors(self) -> int | None:
        """How many tensors it has scaled in all updates together, where each has a factor of its own."""
        ...

    def use_program(self, program: Program) -> None:
        """Go over to another program; only with nothing in flight."""
        ...

    def send_norm(self, version: int) -> None:
        """Measure the complete gradients of the update after ``version``, and tell the other stages what they need."""
        ...

    def can_clip(self, version: int) -> bool:
        """Whether :meth:`norm` would not wait for a stage that cannot act meanwhile."""
        ...

    def norm(self, version: int) -> Tensor | float:
        """A norm that is finite where the gradients are; taken once per update, also of one that is left out."""
        ...

    def apply(self, norm: Tensor | float) -> None:
        """Scale the gradients. Not called for updates that are left out."""
        ...

    def estimate(self) -> ClipEstimate:
        """How the coming update will be clipped, as far as can be known before its gradient is there. Changes nothing."""
        ...

    def abandon(self) -> None:
        """Forget updates that were not carried out."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What coming updates and predictions use."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over :meth:`state_dict`; begin anew where it is that of another rule, or empty."""
        ...


def as_clip(value: Clip | AdaGC | float | str | None) -> Clip | AdaGC | None:
    """``clip=1.0`` is short for ``clip=Clip(1.0)``, and ``clip="adagc"`` for ``clip=AdaGC()``."""
    if value is None or isinstance(value, Clip | AdaGC):
        return value
    if isinstance(value, str):
        if value != "adagc":
            raise ConfigError(f"clip is {value!r}, must be 'adagc', a pipeoptim.Clip or AdaGC, or the largest norm per stage")
        return AdaGC()
    return Clip(value)


__all__ = ["ClipRule", "StageClipper", "as_clip"]
