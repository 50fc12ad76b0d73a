"""Adadelta: the gradient, scaled by the running size of past steps over the running size of gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeoptim.rules.move import Ahead, Group, Move, State, Term, gradient, mean_square_after, scalar, steps_taken
from pipeoptim.rules.registry import Rule, register_rule


@register_rule(torch.optim.Adadelta)
class AdadeltaRule(Rule):
    """``dW = g * sqrt(A) / sqrt(v + eps)``: A is the size of past steps plus eps, before the last step entered it.

    ``acc_delta = rho (A - eps) + (1 - rho) A r`` with ``r = g^2 / (v + eps)`` is solved for A. Taking acc_delta as it
    stands instead would pair a numerator that is one update newer with the present v, and both grow together.
    """

    exact = (
        "Equal to the last displacement at a constant learning rate without weight decay. Under a constant "
        "gradient exact once both averages have converged (after several 1/(1-rho) updates)."
    )
    source = "torch.optim.Adadelta; Zeiler, arXiv 1212.5701; prediction form of arXiv 2312.00839"
    no_decayed = "Adadelta keeps no momentum that could decay"

    def needs_grad(self, group: Group, kind: str) -> bool:
        """The state holds squares only."""
        return True

    def move(self, weight: Tensor, state: State, grad: Tensor | None, group: Group, ahead: Ahead) -> Move | None:
        """See the class."""
        if steps_taken(state) is None or grad is None:
            return None
        rho, eps = scalar(group["rho"]), scalar(group["eps"])
        g = gradient(weight, grad, group, decay=ahead.kind == "refined")
        size = state["square_avg"] + eps
        # The factor between acc_delta and A, at least tiny where g is 0 and rho is too.
        share = g.square().div_(size).mul_(1 - rho).add_(rho).clamp_(min=torch.finfo(size.dtype).tiny)
        past = (state["acc_delta"] + rho * eps).div_(share)
        return Move((Term(ahead.lr_sum, past.div_(size).sqrt_().mul_(g)),))

    def dry_step(self, weight: Tensor, state: State, grad: Tensor, group: Group, ahead: Ahead) -> Move | None:
        """See `Rule`. Here the size of past steps is at hand, and nothing has to be solved for."""
        if "acc_delta" not in state:
            return None
        rho, eps = scalar(group["rho"]), scalar(group["eps"])
        g = gradient(weight, grad, group, decay=True)
        size = mean_square_after(state["square_avg"], g, rho).add_(eps).sqrt_()
        return Move((Term(ahead.lr_sum, (state["acc_delta"] + eps).sqrt_().div_(size).mul_(g)),))
