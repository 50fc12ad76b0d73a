"""Where the weights of a forward or a backward come from: the vocabulary in which methods are written.

A source is small frozen data with one behaviour, :meth:`Source.acquire`. A method that needs another source defines a class
of its own with that method; no engine code changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from pipeoptim.schedule import Program
    from pipeoptim.weights.store import StageWeights, WeightSet


class Source:
    """Chooses a set of weights for micro-batch ``i`` of a stage.

    Attributes:
        predicts: whether the stage needs a predictor for it.
        reuses_forward: for a backward: whether it runs on the very set that the forward of its micro-batch used, which is kept
            with the micro-batch, so that nothing is acquired.
    """

    predicts: ClassVar[bool] = False
    reuses_forward: ClassVar[bool] = False

    @property
    def any_order(self) -> bool:
        """Whether it counts in the action program, whatever that is, instead of by a formula for one order."""
        return True

    @property
    def any_slack(self) -> bool:
        """Whether it is right in its order with any slack: it counts, or goes by the in-flight micro-batches instead of the depth."""
        return self.any_order

    def acquire(self, weights: StageWeights, i: int) -> WeightSet:
        """The weights for micro-batch ``i``; the caller releases them."""
        raise NotImplementedError

    def oldest_needed(self, weights: StageWeights, i: int) -> int | None:
        """The oldest version that forward ``i`` and those after it ask for by number; None if they never do."""
        return None

    def steps_ahead(self, program: Program, k: int, i: int) -> int:
        """How many updates ahead the weights for micro-batch ``i`` of stage ``k`` are predicted; 0 for none."""
        return 0


@dataclass(frozen=True)
class Latest(Source):
    """The newest weights W_t at the time of the action."""

    def acquire(self, weights: StageWeights, i: int) -> WeightSet:
        return weights.latest()


@dataclass(frozen=True)
class Stashed(Source):
    """Backward only: exactly the weights that the forward of the same micro-batch used."""

    reuses_forward: ClassVar[bool] = True

    def acquire(self, weights: StageWeights, i: int) -> WeightSet:
        raise AssertionError("the weights of the forward are kept with the micro-batch, not acquired again")


def counted_gap(program: Program, k: int, i: int) -> int:
    """The version gap of micro-batch ``i`` on stage ``k``, counted in the action program."""
    return program.gap(k, i)


@dataclass(frozen=True)
class Predicted(Source):
    """W_hat(t+s), from the optimizer's update rule; s = ``steps(program, k, i)``, by default the counted version gap."""

    # A named function: `any_order` recognizes it by identity.
    steps: Callable[[Program, int, int], int] = counted_gap
    predicts: ClassVar[bool] = True

    @property
    def any_order(self) -> bool:
        return self.steps is counted_gap

    def acquire(self, weights: StageWeights, i: int) -> WeightSet:
        return weights.predicted(self.steps_ahead(weights.program, weights.k, i))

    def steps_ahead(self, program: Program, k: int, i: int) -> int:
        return self.steps(program, k, i)


@dataclass(frozen=True)
class PredictedOnce(Predicted):
    """One prediction per mini-batch, made by its first micro-batch (the bellwether) and used by all of them."""

    def acquire(self, weights: StageWeights, i: int) -> WeightSet:
        n, j = divmod(i, weights.program.microbatches)
        if j == 0:  # the bellwether: its prediction is pinned until the last micro-batch has taken it
            weights.pin((self, n), weights.predicted(self.steps_ahead(weights.program, weights.k, i)))
        weight_set = weights.pinned((self, n))
        # The caller's hold on the set outlives the pin.
        if j == weights.program.microbatches - 1:
            weights.unpin((self, n))
        return weight_set


@dataclass(frozen=True)
class Numbered(Source):
    """The weights of one chosen version: ``number(program, k, i)`` updates after the last (re)start.

    ``number`` must not decrease from one micro-batch to the next, and must never be ahead of the stage. ``counts`` says that it looks
    into the program, so that it holds with slack as well.
    """

    number: Callable[[Program, int, int], int]
    counts: bool = False

    @property
    def any_order(self) -> bool:
        return False

    @property
    def any_slack(self) -> bool:
        return self.counts

    def acquire(self, weights: StageWeights, i: int) -> WeightSet:
        # Programs count from the last restart, versions from the first update of all.
        return weights.numbered(weights.restart + self.number(weights.program, weights.k, i))

    def oldest_needed(self, weights: StageWeights, i: int) -> int | None:
        return weights.restart + self.number(weights.program, weights.k, i)
