"""The gradient of the coming update, estimated from the mini-batch in progress and the momentum.

    g = f * (value  +  (1 - seen) * m_hat)      clipped by its own norm, which is found over all parameters
              |         '- micro-batches to come
              '- micro-batches so far

    g = last * value  +  (1 - seen) * m_hat     clipped by another norm, as at the last update; m_hat is made of clipped gradients

Where each tensor is clipped by a limit of its own, f is one number per parameter, found from the norm of that estimate alone.

Where the state holds no momentum, the micro-batches to come are taken as ``seen`` times the mean of those so far: the fewer are known,
the less they say, so the estimate is shrunk towards 0. Its error is smaller than that of 0 wherever the mini-batch tells more than its
noise, and never much larger.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from pipeoptim.kernels import calls
from pipeoptim.kernels.library import available
from pipeoptim.kernels.tensor_layout import share_flat_index
from pipeoptim.rules.clip_estimate import ClipEstimate
from pipeoptim.rules.entries import ParameterEntry
from pipeoptim.rules.move import Momentum, PartialGradient, Scalar, as_real

NO_GRADIENT = PartialGradient(None, 0.0)


class GradientEstimate(NamedTuple):
    """``of_value * value + of_mean * mean + of_weight * W``; a part whose tensor is None, or whose factor is 0, is not read."""

    value: Tensor | None
    of_value: Scalar = 1.0
    mean: Tensor | None = None
    of_mean: Scalar = 0.0
    of_weight: Scalar = 0.0

    def scaled(self, factor: Scalar) -> GradientEstimate:
        """``factor`` times it."""
        if not isinstance(factor, Tensor) and factor == 1:
            return self
        return GradientEstimate(self.value, factor * self.of_value, self.mean, factor * self.of_mean, factor * self.of_weight)

    @property
    def kernel_factors(self) -> calls.EstimateFactors:
        """For a kernel, which is given `mean` in place of a `value` that is None."""
        value, mean, weight = self.of_value, self.of_mean, self.of_weight
        assert not (isinstance(value, Tensor) or isinstance(mean, Tensor) or isinstance(weight, Tensor))
        return calls.EstimateFactors(mean, 0.0, weight) if self.value is None else calls.EstimateFactors(value, mean, weight)

    def tensor(self, weight: Tensor) -> Tensor:
        """The estimate itself, in the type of the weight; may be `value`, so it must not be changed."""
        total: Tensor | None = None
        for part, scale in ((self.value, self.of_value), (self.mean, self.of_mean), (weight, self.of_weight)):
            if part is None or _is(scale, 0):
                continue
            part = part.detach().to(weight.dtype)
            if total is None:
                total = part if _is(scale, 1) else part * scale
            else:
                total = torch.addcmul(total, part, scale) if isinstance(scale, Tensor) else total.add(part, alpha=scale)
        return torch.zeros_like(weight) if total is None else total


def estimate(entry: ParameterEntry, partial: PartialGradient | None, clip: ClipEstimate | None) -> GradientEstimate | None:
    """That of one parameter, before it is clipped by its own norm; None where nothing is known of its gradient, or it gets none."""
    value, seen, factor = partial or NO_GRADIENT
    if not entry.weight.requires_grad and value is None:  # frozen: it had updates once, it gets none now
        return None
    value = None if value is None or seen <= 0 else as_real(value)
    return combined_estimate(value, seen, factor, clip, None if seen >= 1 else momentum_of(entry))


def combined_estimate(
    value: Tensor | None, seen: float, factor: Scalar, clip: ClipEstimate | None, momentum: Momentum | None
) -> GradientEstimate | None:
    """The estimate from its parts: those of a `PartialGradient`, and what the optimizer's state knows of the rest."""
    if clip is not None and clip.last_factor is not None:
        factor = factor * clip.last_factor
    missing = 1.0 - seen
    if missing <= 0:
        return None if value is None else GradientEstimate(value, factor)
    if momentum is None:
        return None if value is None else GradientEstimate(value, factor * (1.0 + missing))
    return GradientEstimate(value, factor, momentum.value, missing * momentum.scale, missing * momentum.of_weight)


def momentum_of(entry: ParameterEntry) -> Momentum | None:
    """What the optimizer's state knows of this parameter's gradients; None where that is nothing."""
    if entry.rule is None:
        return None
    weight, state = entry.real_weight, entry.real_state
    return entry.rule.momentum(weight, state, entry.group)


def clip_factors(
    entries: Sequence[ParameterEntry], in_progress: Sequence[PartialGradient | None], clip: ClipEstimate | None
) -> Callable[[int], Scalar]:
    """f: what the estimate of the parameter with this number is multiplied by; found when somebody asks."""
    if clip is None or clip.last_factor is not None:
        return lambda _: 1.0  # the last factor is in the estimate
    partials = in_progress or [None] * len(entries)

    def parts_of(n: int) -> list[tuple[Tensor, GradientEstimate]]:
        known = estimate(entries[n], partials[n], clip)
        return [] if known is None else [(entries[n].real_weight, known)]

    if clip.max_norms is not None:
        return lambda n: clip.own_factor(n, _norm_of(parts_of(n)))
    # The norm is that of all parameters.
    whole = cache(lambda: clip.factor(_norm_of([part for n in range(len(entries)) for part in parts_of(n)])))
    return lambda _: whole()


def _norm_of(parts: Sequence[tuple[Tensor, GradientEstimate]]) -> Scalar:
    """Of these estimates together: a number on a CPU, a tensor where reading it would wait for a device."""
    if not parts:
        return 0.0
    if available() and all(_kernel_can(weight, known) for weight, known in parts):
        return calls.norm_of_estimates(_parts_of(weight, known) for weight, known in parts)
    # As torch.nn.utils.get_total_norm: the norm of the norms, so that it is the update's own where all micro-batches are seen.
    norms = [torch.linalg.vector_norm(known.tensor(weight)) for weight, known in parts]
    first = norms[0].device
    whole: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(first) for norm in norms]))
    return float(whole) if first.type == "cpu" else whole


def _operands(weight: Tensor, known: GradientEstimate) -> tuple[Tensor, Tensor | None, Tensor]:
    first = known.mean if known.value is None else known.value
    assert first is not None
    return first, known.mean, weight


def _parts_of(weight: Tensor, known: GradientEstimate) -> calls.EstimateParts:
    value, mean, w = _operands(weight, known)
    address = 0 if mean is None else mean.data_ptr()
    return calls.EstimateParts(w.numel(), value.data_ptr(), address, w.data_ptr(), known.kernel_factors)


def _kernel_can(weight: Tensor, known: GradientEstimate) -> bool:
    numbers = not any(isinstance(scale, Tensor) for scale in (known.of_value, known.of_mean, known.of_weight))
    return numbers and share_flat_index([tensor for tensor in _operands(weight, known) if tensor is not None])


def _is(scale: Scalar, number: float) -> bool:
    return not isinstance(scale, Tensor) and scale == number
