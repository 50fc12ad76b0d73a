"""A prediction that is made anew as the gradient of the mini-batch in progress grows.

From one micro-batch to the next only the values of the gradient change, and how much of the mini-batch they are::

    update  ──►  F  ──►  B  ──►  F  ──►  B  ──►  F  ──►  B  ──►  update
                 all checked      the kernel again, with other factors
                 and packed       of estimate

So what was found for the first prediction after an update (plan, step counts, coefficients, addresses) holds for the others. Saved: 330 ->
135 us per prediction of a block of the GPT benchmark, of which the kernel takes 90 (``benchmarks/refresh.py`` shows what is left of it).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pipeoptim.kernels import calls
from pipeoptim.rules.clip_estimate import ClipEstimate
from pipeoptim.rules.estimate import NO_GRADIENT, GradientEstimate, combined_estimate
from pipeoptim.rules.fused.batch import BatchEstimates, StepperBatch
from pipeoptim.rules.fused.plan import FusedPlan
from pipeoptim.rules.horizon import Horizon
from pipeoptim.rules.move import Scalar


def clip_scales(
    batches: Sequence[StepperBatch], estimates: Sequence[BatchEstimates], clip: ClipEstimate | None
) -> list[list[Scalar]]:
    """The factor of clipping of each set of each batch, where these have all parameters: their addresses are at hand, which saves asking
    every tensor."""
    pairs = list(zip(batches, estimates, strict=True))
    if clip is None or clip.last_factor is not None:
        return [[1.0] * len(known.known) for known in estimates]
    if clip.max_norms is not None:  # each parameter is a set, in the order of the batch
        return [
            [
                clip.own_factor(place, calls.norm_of_estimates([part]))
                for place, part in zip(batch.places, batch.estimate_parts(known), strict=True)
            ]
            for batch, known in pairs
        ]
    whole = clip.factor(calls.norm_of_estimates(part for batch, known in pairs for part in batch.estimate_parts(known)))
    return [[whole] * len(known.known) for known in estimates]


class GrowingPrediction:
    """Makes a prediction by kernels anew. Valid while nothing but gradients in progress changes: until the next update at the latest.

    Args:
        plan: of all parameters.
        out: what the prediction was written into.
        estimates, steps: of each batch.
        horizon: what the prediction was made from.
    """

    def __init__(
        self,
        plan: FusedPlan,
        out: Sequence[Tensor],
        estimates: Sequence[BatchEstimates],
        steps: Sequence[calls.DryStep],
        horizon: Horizon,
    ) -> None:
        self._plan, self._out, self._steps = plan, out, steps  # the plan keeps the tensors alive
        self._estimates = [one._replace(known=[]) for one in estimates]  # not the gradients, which the next update frees
        self._addresses = [0 if p is None or p.value is None else p.value.data_ptr() for p in horizon.in_progress]
        # Of one parameter of each set: its place among all, or None where its gradient is not known, and the mean of its gradients.
        self._samples = [
            [
                (None if horizon.partial(entry := batch.entries[first]) is None else entry.number, momentum)
                for (first, _), momentum in zip(one.samples, one.momenta, strict=True)
            ]
            for batch, one in zip(plan.batches, estimates, strict=True)
        ]

    def __call__(
        self,
        out: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        seen: float,
        factor: Scalar,
        clip: ClipEstimate | None,
    ) -> bool:
        """Write the prediction anew. False, with nothing done, where other parameters have gradients by now, or they lie elsewhere.

        Args:
            out: one buffer per parameter, of the types and strides of those of the first prediction.
            gradients: of every parameter the sum so far; None where there is none, or where it is not known.
            seen, factor: see `PartialGradient`.
            clip: how that gradient will be clipped.
        """
        if seen <= 0 or isinstance(factor, Tensor) or [0 if g is None else g.data_ptr() for g in gradients] != self._addresses:
            return False
        known: list[list[GradientEstimate]] = []
        for samples in self._samples:
            known.append([])
            for place, momentum in samples:
                partial = NO_GRADIENT if place is None else (gradients[place], seen, factor)
                found = combined_estimate(partial[0], partial[1], partial[2], clip, momentum)
                if found is None:  # of the whole mini-batch it has no gradient, so it stays
                    return False
                known[-1].append(found)
        if out is not self._out:
            self._write_into(out)
        estimates = [one._replace(known=those) for one, those in zip(self._estimates, known, strict=True)]
        scales = clip_scales(self._plan.batches, estimates, clip)
        for step, those, own in zip(self._steps, estimates, scales, strict=True):
            step.run(those.factors(own))
        return True

    def _write_into(self, out: Sequence[Tensor]) -> None:
        self._out = out
        for step, batch in zip(self._steps, self._plan.batches, strict=True):
            step.write_into([out[place].data_ptr() for place in batch.places])
