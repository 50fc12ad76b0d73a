"""Rprop: the sign of the gradient times a step size of its own for each weight."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeoptim.rules.move import Ahead, Group, Momentum, Move, State, Term, steps_taken
from pipeoptim.rules.registry import Rule, register_rule


@register_rule(torch.optim.Rprop)
class RpropRule(Rule):
    """Paper: ``dW = sign(g) * size``; refined lets the sizes grow by eta+ per update up to their limit.

    The learning rate plays no part: Rprop uses it only for the first step size. Where a sign just flipped,
    Rprop pauses for one update (prev = 0 there) and then goes on without growth.
    """

    exact = "Refined: a constant gradient, for any s. Paper: equal to the last displacement."
    source = "torch.optim.Rprop; Riedmiller and Braun 1993; prediction form of arXiv 2312.00839"
    no_decayed = "Rprop keeps no momentum that could decay"

    def needs_grad(self, group: Group, kind: str) -> bool:
        """Refined has to know where a weight goes after its pause."""
        return kind == "refined"

    def move(self, weight: Tensor, state: State, grad: Tensor | None, group: Group, ahead: Ahead) -> Move | None:
        """See the class."""
        if steps_taken(state) is None:
            return None
        previous, size = state["prev"], state["step_size"]
        if ahead.kind == "paper":
            return Move((Term(float(ahead.steps), previous.sign() * size),))
        if grad is None:
            grad = previous  # of the last update, with its sign; 0 where a weight pauses, which then seems to stay
        elif group["maximize"]:
            grad = -grad
        _, eta_plus = group["etas"]
        low, high = group["step_sizes"]
        grows = (grad * previous) > 0
        reach = torch.zeros_like(size)
        size = torch.where(grows, size * eta_plus, size).clamp_(low, high)
        for _ in range(ahead.steps):  # no closed form: growth stops at a limit, for each weight at another update
            reach += size
            size = (size * eta_plus).clamp_(low, high)
        return Move((Term(1.0, reach.mul_(grad.sign())),))

    def momentum(self, weight: Tensor, state: State, group: Group) -> Momentum | None:
        """See `Rule`. No mean: the last gradient, 0 where a weight pauses."""
        return None if steps_taken(state) is None else Momentum(state["prev"], -1.0 if group["maximize"] else 1.0)

    def dry_step(self, weight: Tensor, state: State, grad: Tensor, group: Group, ahead: Ahead) -> Move | None:
        """See `Rule`. A weight that pauses in the first of the updates stays."""
        if "prev" not in state:
            return None
        g = -grad if group["maximize"] else grad
        (eta_minus, eta_plus), (low, high) = group["etas"], group["step_sizes"]
        agree = g * state["prev"]
        size = state["step_size"]
        size = torch.where(agree > 0, size * eta_plus, torch.where(agree < 0, size * eta_minus, size)).clamp_(low, high)
        reach = size.clone()
        for _ in range(ahead.steps - 1):
            size = (size * eta_plus).clamp_(low, high)
            reach += size
        return Move((Term(1.0, torch.where(agree < 0, 0, g.sign().mul_(reach))),))
