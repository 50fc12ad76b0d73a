"""Predictions by a dry step: what the optimizer would do with the gradient that the mini-batch in progress lets expect.

PartialGradient ── estimate ──► g ──► Rule.dry_step ──► Move ──► MoveBatch
                      |          '──► scratch_step (no rule, or no state yet) ──► weight after one update
                      '──► fused.dry: all of it in one pass, where there is a kernel
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

import torch
from torch import Tensor

from pipeoptim.rules.checks import check_dense
from pipeoptim.rules.entries import ParameterEntry
from pipeoptim.rules.estimate import clip_factors, estimate
from pipeoptim.rules.horizon import Horizon
from pipeoptim.rules.interpreters import MoveBatch
from pipeoptim.rules.move import Ahead, Scalar, as_real, total
from pipeoptim.rules.scratch import scratch_step

DryStepKernel = Callable[[Sequence[ParameterEntry], Horizon, Callable[[int], Scalar], Sequence[Tensor]], Container[int]]
"""Predicts what it can of these parameters, and returns their places (`rules.fused.dry`)."""


def predict_by_dry_step(
    entries: Sequence[ParameterEntry],
    horizon: Horizon,
    out: Sequence[Tensor],
    batch: MoveBatch,
    by_kernel: DryStepKernel | None,
) -> None:
    """Write ``W_hat`` of every parameter of the kind "in_progress", now or at the batch's next flush. Call it without gradients.

    `by_kernel`: what does it in one pass over memory, for the parameters that it can.
    """
    if not any(entry.in_progress for entry in entries):
        return
    # Of all parameters, those of other kinds included.
    factor = clip_factors(entries, horizon.in_progress, horizon.clip)
    done = by_kernel(entries, horizon, factor, out) if by_kernel is not None else ()
    for entry, buffer in zip(entries, out, strict=True):
        if entry.in_progress and entry.number not in done:
            _predict(entry, horizon, factor, buffer, batch)


def _predict(
    entry: ParameterEntry, horizon: Horizon, factor: Callable[[int], Scalar], buffer: Tensor, batch: MoveBatch
) -> None:
    ahead = horizon.ahead(entry)
    check_dense(entry.weight, None if ahead.in_progress is None else ahead.in_progress.value)
    known = estimate(entry, ahead.in_progress, horizon.clip)
    if known is None:
        buffer.copy_(entry.weight)
        return
    weight = entry.real_weight
    g = known.scaled(factor(entry.number)).tensor(weight)
    move = None if entry.rule is None else entry.rule.dry_step(weight, entry.real_state, g, entry.group, ahead)
    if move is not None:
        batch.add(weight, move.scaled(ahead.scale), as_real(buffer.detach()))
        return
    # A fresh tensor, as the view of a complex gradient may be the caller's.
    whole = torch.view_as_complex(g.contiguous()) if entry.weight.is_complex() else g
    after = scratch_step(entry.optimizer, entry.group, entry.parameter, entry.weight, entry.state, whole)
    _continue(entry.weight.detach(), after, ahead, buffer)


def _continue(weight: Tensor, after: Tensor, ahead: Ahead, buffer: Tensor) -> None:
    """From the weight after one update to the one after s: further displacements like the first, as their rates say."""
    steps = _steps_of_first_rate(ahead)
    if ahead.scale == 1 and ahead.steps == 1:
        buffer.copy_(after)  # not by lerp, which may round
    else:
        buffer.copy_(torch.lerp(weight, after, ahead.scale * steps))  # the buffer may have another type


def _steps_of_first_rate(ahead: Ahead) -> Scalar:
    """How many updates at the first learning rate go as far as all of them do."""
    first, later = ahead.rates[0], ahead.rates[1:]
    if not later:
        return 1.0
    if not isinstance(first, Tensor) and first == 0:
        return float(ahead.steps)  # a displacement of 0, or of an optimizer that ignores its rate
    return 1.0 + total([rate / first for rate in later])
