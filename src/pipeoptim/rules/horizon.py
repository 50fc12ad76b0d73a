"""What the predictions of all parameters of an optimizer are made from, as one value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pipeoptim.rules.clip_estimate import ClipEstimate
from pipeoptim.rules.entries import ParameterEntry
from pipeoptim.rules.move import Ahead, PartialGradient, Scalar

Share = tuple[bool, float, Scalar]
NOTHING_SEEN: Share = (True, 0.0, 1.0)


class Horizon(NamedTuple):
    """How far ahead to predict, and what is known of the updates until then.

    Live information that a new kind of prediction needs is one more field here and in `Ahead`.

    Attributes:
        steps: the version gap ``s``, in updates.
        rates: for each param group the learning rates of the next s updates.
        scales: for each param group the factor on its predicted displacements: ``W + scale * (W_hat - W)``; empty for 1.
        in_progress: for each parameter the gradient of the mini-batch in progress; empty where it is not known.
        clip: how the gradient of that mini-batch will be clipped; None where it is not.
    """

    steps: int
    rates: Sequence[tuple[Scalar, ...]]
    scales: Sequence[float] = ()
    in_progress: Sequence[PartialGradient | None] = ()
    clip: ClipEstimate | None = None

    def scale(self, entry: ParameterEntry) -> float:
        """Factor on the displacement of one parameter."""
        return self.scales[entry.group_number] if self.scales else 1.0

    def displacements(self, entry: ParameterEntry) -> float:
        """How many times the last displacement is added to a weight that is predicted by it."""
        return self.steps * self.scale(entry)

    def share(self, number: int) -> Share:
        """What is known of the gradient of one parameter, as numbers: parameters that agree in it have the same estimate."""
        partial = self.in_progress[number]
        return NOTHING_SEEN if partial is None else (partial.value is None, partial.seen, partial.factor)

    def partial(self, entry: ParameterEntry) -> PartialGradient | None:
        """The gradient in progress of one parameter; None where it is not known."""
        return self.in_progress[entry.number] if self.in_progress else None

    def ahead(self, entry: ParameterEntry) -> Ahead:
        """What a rule is told about one parameter."""
        rates = self.rates[entry.group_number]
        if entry.kind == "paper":  # the paper knows of no schedule: the present rate is repeated
            rates = (rates[0],) * len(rates)
        return Ahead(entry.kind, rates, self.scale(entry), self.partial(entry))
