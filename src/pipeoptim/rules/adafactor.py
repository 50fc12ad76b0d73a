"""Adafactor: the gradient over a factored second moment, clipped, in steps relative to the size of the weight."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pipeoptim.rules.move import (
    Ahead,
    Group,
    Move,
    Scalar,
    State,
    Term,
    decoupled_keep,
    gradient,
    steps_after,
    steps_taken,
    total,
)
from pipeoptim.rules.registry import Rule, register_rule


@register_rule(torch.optim.Adafactor)
class AdafactorRule(Rule):
    """``dW = max(eps2, rms(W)) * U / max(1, rms(U)/d)``, U = g / sqrt(V), rate ``rho_i = min(lr_i, 1/sqrt(t+i))``."""

    elementwise = False
    exact = (
        "s = 1 under a gradient constant from the first update on, without weight decay. Beyond that up "
        "to the relative change of rms(W) over s updates; decoupled decay is linear in s."
    )
    source = "torch.optim.Adafactor; Shazeer and Stern, arXiv 1804.04235; prediction form of arXiv 2312.00839"
    no_decayed = "Adafactor in torch keeps no momentum that could decay"

    def needs_grad(self, group: Group, kind: str) -> bool:
        """The state holds squares only."""
        return True

    def move(self, weight: Tensor, state: State, grad: Tensor | None, group: Group, ahead: Ahead) -> Move | None:
        """See the class."""
        taken = steps_taken(state)
        if taken is None or grad is None:
            return None
        t = float(taken)
        update = _second_moment(weight, state, group).rsqrt_().mul_(gradient(weight, grad, group, decay=False))
        relative = _rms(weight).clamp_(min=group["eps"][1])
        clip = (_rms(update) / group["d"]).clamp_(min=1.0)
        update.mul_(relative / clip)
        # The paper's form repeats the last update; refined lets the limit 1/sqrt(t) fall on.
        ages = [t if ahead.kind == "paper" else t + ahead.first + i for i in range(ahead.steps)]
        rate = total([_smaller(lr, age**-0.5) for lr, age in zip(ahead.rates, ages, strict=True)])
        return Move((Term(rate, update),), decoupled_keep(group, ahead, decay=True))

    def dry_step(self, weight: Tensor, state: State, grad: Tensor, group: Group, ahead: Ahead) -> Move | None:
        """See `Rule`."""
        if "step" not in state:
            return None
        step = float(steps_after(state))
        g, share = gradient(weight, grad, group, decay=False), step ** group["beta2_decay"]
        after: dict[str, Any] = {"step": step}
        if g.dim() > 1:
            for name, dim in (("row_var", -1), ("col_var", -2)):
                mean = torch.linalg.vector_norm(g, dim=dim, keepdim=True).square_().div_(g.size(dim))
                after[name] = state[name].lerp(mean, share)
        else:
            after["variance"] = state["variance"].lerp(g * g, share)
        return self.move(weight, after, grad, group, ahead.from_state_after())


def _second_moment(weight: Tensor, state: State, group: Group) -> Tensor:
    """V, from its row and column means for a matrix; a new tensor, at least eps1 squared."""
    eps1 = group["eps"][0]
    eps1 = torch.finfo(weight.dtype).eps if eps1 is None else eps1
    if "variance" in state:
        return torch.clamp(state["variance"], min=eps1 * eps1)
    row, column = state["row_var"], state["col_var"]
    estimate: Tensor = (row @ column) / row.mean(dim=-2, keepdim=True).clamp_(min=eps1)
    return estimate.clamp_(min=eps1 * eps1)


def _rms(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor)
    return norm / math.sqrt(max(1, tensor.numel()))


def _smaller(rate: Scalar, limit: float) -> Scalar:
    return rate.clamp(max=limit) if isinstance(rate, Tensor) else min(rate, limit)
