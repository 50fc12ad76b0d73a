"""``scale="auto"``: predictions multiplied by what would have been right, per parameter group, measured while training.

With ``a`` the displacement that was predicted, without any factor, and ``b`` the one that came, ``sum |scale * a - b|^2`` over past
predictions is least for ``scale = sum(a.b) / sum(a.a)``. Both sums forget exponentially, and are of a sample of the weights::

    U(t)   apply(): the factor from here on ──► step (and predict, in the same pass) ──► what was predicted for t+1, against t+1
              ^                                                                              |
              '── at the next U ───────────────── sums of a.b and a.a ◄──────────────────────'

The factor changes in U only, before the step: a prediction that is made along with the step holds until the next one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeoptim.engine.stage.displacement_samples import DisplacementSamples, Products, ScaledPredictor, summed_tables

EVERY = 4
"""Versions between measurements; each costs what one of the monitor's does, 0.3 % of a step of the recipe "chars"."""

KEPT = 0.9
"""Share of the sums that one measurement leaves: they remember about 40 versions."""

LARGEST = 2.0
LEAST = 2.0**-5
"""Not 0: of no displacement nothing could be measured any more. With it a prediction of pure noise is 0.05 % worse than none."""


class PredictionScale(DisplacementSamples):
    """The factors on the predictions of stage ``k``.

    Args:
        groups: the parameters of each parameter group, as the module holds them.
        k: the stage.
        predictor: what makes the predictions.
        summed: the sum of some numbers over the replicas of the stage, so that all have the same factors.
    """

    def __init__(
        self, groups: Sequence[Sequence[Tensor]], k: int, predictor: ScaledPredictor, summed: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__(groups, k, EVERY)
        self.predictor: ScaledPredictor = predictor
        self._summed, self._device = summed, next((p.device for group in groups for p in group), torch.device("cpu"))
        self._sums = [(0.0, 0.0) for _ in groups]  # of a.b and a.a
        self.predictor.scales = (1.0,) * len(groups)

    def apply(self) -> None:
        """Predict from here on with what the measurements so far say."""
        self.predictor.scales = tuple(_best(*sums) for sums in self._sums)

    def _take_in(self, version: int, steps: int, scales: tuple[float, ...], tables: Products) -> None:
        # All predictions of a version at once, those of later micro-batches too: one factor has to serve them all.
        rows = summed_tables(tables)
        found = [(together / scale, expected / scale**2) for (expected, together, _), scale in zip(rows, scales, strict=True)]
        # Replicas have other gradients in progress, and other shards. The scale of the sums cancels in their ratio.
        totals = self._summed(torch.tensor(found, dtype=torch.float64, device=self._device)).tolist()
        self._sums = [_forgetting(old, new) for old, new in zip(self._sums, totals, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"sums": [list(sums) for sums in self._sums], "scales": list(self.predictor.scales)}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Take over :meth:`state_dict`; None, or that of other groups: nothing has been measured yet."""
        count = len(self._sums)
        if state is None or len(state["sums"]) != count:
            state = {"sums": [(0.0, 0.0)] * count, "scales": [1.0] * count}
        self._sums = [(float(ab), float(aa)) for ab, aa in state["sums"]]
        self.predictor.scales = tuple(map(float, state["scales"]))


def _forgetting(old: tuple[float, float], new: Sequence[float]) -> tuple[float, float]:
    """The sums after one more measurement; the old ones where it is of weights that are not finite."""
    if not all(map(math.isfinite, new)):
        return old
    return KEPT * old[0] + new[0], KEPT * old[1] + new[1]


def _best(together: float, expected: float) -> float:
    """The factor that fits best, within its bounds; 1 where nothing has been predicted yet.

    >>> _best(1.0, 2.0), _best(9.0, 2.0), _best(-1.0, 2.0), _best(0.0, 0.0)
    (0.5, 2.0, 0.03125, 1.0)
    """
    return min(LARGEST, max(LEAST, together / expected)) if expected > 0 else 1.0
