"""Predictions from the gradient of the mini-batch in progress: what a stage has of it, in the units of the coming update.

When F of a micro-batch runs, the stage has often had the backward of some micro-batches of the update that this F misses::

    stage k   ... U  F  B0  F  B1  F  B2  F ...
                                        '-- predicted from the sum of the gradients of B0, B1 and B2, and the momentum for the rest

Nothing is exchanged for it: the estimate is that of this stage, and of this replica.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor
from torch.nn.utils import get_total_norm

from pipeoptim.engine.stage.clipping import StageClipper
from pipeoptim.engine.stage.finite_check import FiniteCheck
from pipeoptim.engine.stage.loss_scaling import LossScale
from pipeoptim.errors import ConfigError
from pipeoptim.methods import Method
from pipeoptim.rules import KINDS, ClipEstimate, PartialGradient, Predictor
from pipeoptim.rules.fused.growing import GrowingPrediction
from pipeoptim.weights import UpdateProgress
from pipeoptim.weights.store import WeightPredictor


class StageGradient(NamedTuple):
    """What is known of the gradient of the coming update.

    Attributes:
        sums: of every parameter the gradient so far, without a copy; None where there is none.
        seen, factor: of all of them, see :class:`~pipeoptim.rules.PartialGradient`.
        clip: how the update will be clipped; None where it will not.
    """

    sums: Sequence[Tensor | None]
    seen: float
    factor: float
    clip: ClipEstimate | None


class GradientSoFar:
    """The gradient that has been added up on one stage since its last update.

    Args:
        parameters: what the optimizer moves.
        progress: which part of the mini-batch has been added up.
        summed_elsewhere: those of ``parameters`` whose gradient is a sum over stages, of which this one has only its own part.
        clipper, scaling: None where the stage does not clip, or scale its loss.
        finite: knows whether the coming update will be left out.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        progress: UpdateProgress,
        summed_elsewhere: Sequence[Tensor],
        clipper: StageClipper | None,
        scaling: LossScale | None,
        finite: FiniteCheck,
    ) -> None:
        # By identity: == of tensors compares their values.
        others = {id(p) for p in summed_elsewhere}
        self._parameters = list(parameters)
        self._elsewhere = [n for n, p in enumerate(parameters) if id(p) in others]
        self.progress, self._clipper, self._scaling, self._finite_check = progress, clipper, scaling, finite

    def __call__(self) -> StageGradient | None:
        """As it is now; None where nothing is known."""
        if self._finite_check.found:
            return None  # of the updates that are predicted it is none
        sums = [p.grad for p in self._parameters]
        if (self._scaling is not None or self._finite_check.looks) and not _finite(sums):
            return None  # the update will be skipped, and whatever is predicted must be finite
        for n in self._elsewhere:
            sums[n] = None
        factor = 1.0 if self._scaling is None else 1.0 / self._scaling.current
        clip = None if self._clipper is None else self._clipper.estimate()
        return StageGradient(sums, self.progress.share_done, factor, clip)

    def partial_gradients(self, known: StageGradient) -> list[PartialGradient | None]:
        """What is ``known`` of each parameter; None where that is nothing."""
        partial: list[PartialGradient | None] = [PartialGradient(grad, known.seen, known.factor) for grad in known.sums]
        for n in self._elsewhere:
            partial[n] = None
        return partial


def _finite(sums: Sequence[Tensor | None]) -> bool:
    grads = [grad for grad in sums if grad is not None]
    # The largest element, which no sum of squares can overflow; the device is waited for, as in the update itself.
    return not grads or math.isfinite(float(get_total_norm(grads, math.inf)))


@runtime_checkable
class ProgressPredictor(Protocol):
    """A predictor that may use the gradient of the mini-batch in progress (see :class:`pipeoptim.rules.Predictor`)."""

    @property
    def uses_in_progress(self) -> bool: ...

    @property
    def needs_previous(self) -> bool: ...

    def before_step(self, spare: Sequence[Tensor] | None) -> None: ...

    def after_step(self) -> None: ...

    def predict_into(
        self,
        out: Sequence[Tensor],
        steps: int,
        in_progress: Sequence[PartialGradient | None] = (),
        clip: ClipEstimate | None = None,
    ) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def progress_predictor(predictor: WeightPredictor, method: Method, kind: str) -> ProgressPredictor | None:
    """``predictor`` where it uses the gradient of the mini-batch in progress, else None.

    Raises:
        ConfigError: only one of it and the pipeline's ``kind`` of prediction does.
    """
    able = predictor if isinstance(predictor, ProgressPredictor) else None
    if KINDS[kind].in_progress and able is None:
        raise ConfigError(
            f"prediction is {kind!r}, but method {method.name!r} predicts in a way of its own; leave it out, or choose a method that "
            "predicts by the optimizer's rule, for example 'pipeoptim'"
        )
    if able is None or not able.uses_in_progress:
        return None
    if not KINDS[kind].in_progress:  # how many copies of the weights there are is promised from the pipeline's kind
        raise ConfigError(
            f"a param group predicts from the mini-batch in progress, but the pipeline's prediction is {kind!r}; set that one to "
            "'in_progress', and give the other groups theirs"
        )
    return able


class InProgressPredictor:
    """Tells ``inner`` the gradient so far whenever it predicts."""

    def __init__(self, inner: ProgressPredictor, gradient: GradientSoFar) -> None:
        self.inner, self.gradient = inner, gradient
        # What makes predictions anew, by steps, and the updates that were over when they were made.
        self._growing: dict[int, GrowingPrediction] = {}
        self._made_after = 0
        self.before_step, self.after_step = inner.before_step, inner.after_step
        self.state_dict, self.load_state_dict = inner.state_dict, inner.load_state_dict

    @property
    def needs_previous(self) -> bool:
        """As :class:`pipeoptim.rules.Predictor`."""
        return self.inner.needs_previous

    def predict_into(self, out: Sequence[Tensor], steps: int) -> None:
        """Write the prediction into ``out``."""
        if self._made_after != self.gradient.progress.updates:
            self.forget()
        known = self.gradient()
        if known is None:
            self.inner.predict_into(out, steps)
            return
        growing = self._growing.get(steps)
        if growing is not None and growing(out, *known):  # all buffers of a stage lie as its parameters do
            return
        self.inner.predict_into(out, steps, self.gradient.partial_gradients(known), known.clip)
        if isinstance(self.inner, Predictor) and self.inner.growing is not None:
            self._growing[steps] = self.inner.growing

    def forget(self) -> None:
        """Make every prediction from the beginning: an update has come, or a script may have changed anything."""
        self._growing.clear()
        self._made_after = self.gradient.progress.updates
