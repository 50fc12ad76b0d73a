"""Adamax: Adam with the infinity norm in place of the second moment."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeoptim.rules.move import Ahead, Group, Move, Scalar, State, Term, scalar, steps_taken
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
