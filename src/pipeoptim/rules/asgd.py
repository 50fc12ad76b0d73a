"""ASGD: SGD with a falling step size eta; the averaged weights are a by-product and not predicted."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pipeoptim.rules.move import Ahead, Group, Move, Scalar, State, Term, gradient, scalar, steps_taken, total
from pipeoptim.rules.registry import Rule, register_rule


@register_rule(torch.optim.ASGD)
class ASGDRule(Rule):
    """``W_hat = W - (sum of the next etas) * (g + (wd + lambd) W)``; paper: ``W - s * eta * g``."""

    exact = "A constant gradient for s = 1; beyond that up to O((eta (wd + lambd) s)^2)."
    source = "torch.optim.ASGD; Polyak and Juditsky 1992; prediction form of arXiv 2312.00839"
    no_decayed = "ASGD keeps no momentum that could decay"

    def needs_grad(self, group: Group, kind: str) -> bool:
        """The state holds no direction."""
        return True

    def move(self, weight: Tensor, state: State, grad: Tensor | None, group: Group, ahead: Ahead) -> Move | None:
        """See the class."""
        t = steps_taken(state)
        if t is None or grad is None:
            return None
        if ahead.kind == "paper":
            rate: Scalar = scalar(state["eta"]) * ahead.steps
            return Move((Term(rate, gradient(weight, grad, group, decay=False)),))
        rate = total(_etas(state, t, group, ahead))
        return Move((Term(rate, gradient(weight, grad, group, decay=True)),), 1.0 - rate * group["lambd"])

    def dry_step(self, weight: Tensor, state: State, grad: Tensor, group: Group, ahead: Ahead) -> Move | None:
        """See `Rule`. All that moves a weight besides the gradient is the eta of the update before."""
        return self.move(weight, state, grad, group, replace(ahead, kind="refined"))


def _etas(state: State, t: Scalar, group: Group, ahead: Ahead) -> list[Scalar]:
    """Step sizes of the next s updates; torch computes each at the end of the update before it."""
    lambd, alpha = group["lambd"], group["alpha"]
    # The first of the next updates uses the eta in the state, which no later change of the learning rate reaches.
    later = [lr / ((1 + lambd * lr * (t + i)) ** alpha) for i, lr in enumerate(ahead.rates[:-1], start=1)]
    return [scalar(state["eta"]), *later]
