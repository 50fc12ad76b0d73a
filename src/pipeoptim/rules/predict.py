"""`predict_weights`: the prediction as a pure function, for scripts, tests and notebooks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pipeoptim.rules.checks import check_in_progress, check_steps
from pipeoptim.rules.clip_estimate import ClipEstimate
from pipeoptim.rules.combined import members
from pipeoptim.rules.displacement import PREVIOUS, extrapolate
from pipeoptim.rules.entries import ParameterEntry, parameter_entries
from pipeoptim.rules.fallback import copy_weights, next_weights_of_copy
from pipeoptim.rules.fused.dry import FusedDryStep
from pipeoptim.rules.horizon import Horizon
from pipeoptim.rules.lr import next_rates
from pipeoptim.rules.move import PartialGradient
from pipeoptim.rules.registry import RULE_KINDS
from pipeoptim.rules.rule_moves import predict_by_rule
from pipeoptim.rules.tracking import tracked_previous


@torch.no_grad()
def predict_weights(
    optimizer: Optimizer,
    steps: int,
    *,
    kind: str = "refined",
    scheduler: LRScheduler | None = None,
    in_progress: Sequence[PartialGradient | None] = (),
    clip: ClipEstimate | None = None,
) -> list[Tensor]:
    """The weights that this optimizer will have after `steps` more updates, as far as its state tells.

    ``W_hat(t+s) = W_t - lr * s * dW_t``, s = `steps`, dW_t from the optimizer's own update rule and its
    state after its last step. Changes nothing: not the optimizer, its state, the weights, the gradients or
    torch's random numbers.

    Args:
        optimizer: a torch optimizer, or a `CombinedOptimizer`, after its last step. SGD without momentum, and
            some others, keep no direction in their state: there the gradients of the last step must still be
            in ``p.grad``.
        steps: version gap s >= 0, in updates. 0 returns the weights themselves, bit for bit.
        kind: "refined" (every flag of the optimizer), "paper" (arXiv 2312.00839), "decayed" (zero gradients
            ahead), "in_progress" (one step of the optimizer on the gradient that the mini-batch in progress lets
            expect: ``g = value + (1 - seen) * m_hat``), "displacement" (``W_t + s (W_t - W_{t-1})``; call `track` before the last step), or
            "none".
            A param group with an entry "prediction" uses that kind instead.
        in_progress: for the kind "in_progress", what each parameter's gradient is so far in the mini-batch of the next
            update; None, or empty, where nothing is known: then the momentum stands for all of it.
        clip: for the kind "in_progress", how that gradient will be clipped.
        scheduler: with it, "refined", "decayed" and "in_progress" use the rates of the next s updates instead of s times
            the present one. Call after ``scheduler.step()``.

    Returns:
        One new tensor per parameter, in param_groups order, with its shape, dtype, device and memory
        format. Before the first update, and for parameters that do not move, the weights themselves.

        Without a rule for the optimizer: the last displacement if it is tracked; else, if there are
        gradients, s times the displacement of one step of a copy (exact for s = 1 and a constant gradient);
        else the weights themselves.

    Raises:
        ConfigError: steps is negative or no int; unknown or unoffered kind; sparse weights or gradients;
            differentiable=True; LBFGS and SparseAdam; a scheduler of another optimizer.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.ones(2)); w.grad = torch.ones(2)
        >>> opt = torch.optim.SGD([w], lr=0.1, momentum=0.9)
        >>> opt.step()
        >>> predict_weights(opt, 3)
        [tensor([0.6000, 0.6000])]

    Source: arXiv 2312.00839, section 3; deviations of "refined" are stated by each rule
    (``RULES[cls].exact``).
    """
    check_steps(steps)
    entries = parameter_entries(optimizer, kind)
    used = any(entry.in_progress for entry in entries)
    check_in_progress(in_progress, clip, [entry.weight for entry in entries], used=used)
    out = [torch.empty_like(entry.weight.detach()) for entry in entries]
    if steps == 0:
        copy_weights([entry.weight for entry in entries], out)
        return out
    by_rule = any(entry.kind in RULE_KINDS for entry in entries)
    # A scheduler of another optimizer is refused also where nothing reads its rates.
    rates = next_rates(optimizer, scheduler, steps) if by_rule or scheduler is not None else []
    grads = [entry.weight.grad if by_rule else None for entry in entries]
    predict_by_rule(entries, grads, Horizon(steps, rates, in_progress=in_progress, clip=clip), out, dry_kernel=FusedDryStep())
    for member in members(optimizer):
        _predict_by_displacement(member, entries, steps, out)
    return out


def _predict_by_displacement(optimizer: Optimizer, entries: list[ParameterEntry], steps: int, out: list[Tensor]) -> None:
    """Those parameters of `optimizer` that are predicted so."""
    own = [entry for entry in entries if entry.optimizer is optimizer]
    if not any(entry.kind == "displacement" for entry in own):
        return
    points, position = tracked_previous(optimizer), PREVIOUS
    if points is None:  # untracked: a copy takes the next step instead, W + 1 * d
        points, position = next_weights_of_copy(optimizer), 1.0
    if points is None:
        if any(_has_stepped(state) for state in optimizer.state.values()):
            warnings.warn(
                f"{type(optimizer).__name__} was not tracked and has no gradients: its last displacement "
                "is unknown, and the weights are used unpredicted. Call pipeoptim.track(optimizer) before "
                "its last step.",
                stacklevel=4,
            )
        points, position = [entry.weight.detach() for entry in own], 1.0
    for entry, point in zip(own, points, strict=True):
        if entry.kind == "displacement":
            extrapolate(entry.weight, point, position, steps, out[entry.number])


def _has_stepped(state: Any) -> bool:
    """Whether this state comes from an update (some optimizers make theirs before the first, with a step count of 0)."""
    return not isinstance(state, Mapping) or "step" not in state or float(state["step"]) > 0
