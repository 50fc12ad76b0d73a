"""Adamax: Adam with the infinity norm in place of the second moment."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeoptim.rules.adam import first_moment
from pipeoptim.rules.move import (
    Ahead,
    Group,
    Momentum,
    Move,
    Scalar,
    State,
    Term,
    gradient,
    scalar,
    steps_after,
    steps_taken,
)
from pipeoptim.rules.registry import Rule, register_rule


@register_rule(torch.optim.Adamax)
class AdamaxRule(Rule):
    """``dW = m / ((1-b1^t) u)``, u = the decayed maximum of abs(g) + eps."""

    exact = "A gradient that was constant from the first update on. Equal to the last displacement at a constant learning rate."
    source = "torch.optim.Adamax; Kingma and Ba, arXiv 1412.6980, section 7.1; prediction form of arXiv 2312.00839"

    def move(self, weight: Tensor, state: State, grad: Tensor | None, group: Group, ahead: Ahead) -> Move | None:
        """See the class."""
        t = steps_taken(state)
        if t is None:
            return None
        beta1 = scalar(group["betas"][0])
        scale: Scalar = ahead.lr_sum / (1 - beta1**t)
        if ahead.kind == "decayed":  # zero gradients ahead: m fades by b1 per update, u is kept
            scale = sum((lr * beta1**i / (1 - beta1 ** (t + i)) for i, lr in enumerate(ahead.rates, start=1)), 0.0)
        return Move((Term(scale, state["exp_avg"] / state["exp_inf"]),))

    def momentum(self, weight: Tensor, state: State, group: Group) -> Momentum | None:
        """See `Rule`."""
        return first_moment(state, group, decay=True)

    def dry_step(self, weight: Tensor, state: State, grad: Tensor, group: Group, ahead: Ahead) -> Move | None:
        """See `Rule`."""
        if "exp_avg" not in state:
            return None
        g = gradient(weight, grad, group, decay=True)
        beta1, beta2 = (scalar(beta) for beta in group["betas"])
        largest = torch.maximum(state["exp_inf"] * beta2, g.abs().add_(scalar(group["eps"])))
        after = {"step": steps_after(state), "exp_avg": state["exp_avg"].lerp(g, 1 - beta1), "exp_inf": largest}
        return self.move(weight, after, grad, group, ahead.from_state_after())
