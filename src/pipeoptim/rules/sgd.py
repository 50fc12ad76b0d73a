"""SGD: the gradient, the momentum buffer, or both with Nesterov momentum."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeoptim.rules.fused.steppers import SgdStepper
from pipeoptim.rules.move import Ahead, Group, Move, Scalar, State, Term, scalar
from pipeoptim.rules.registry import Rule, register_rule


@register_rule(torch.optim.SGD)
class SGDRule(Rule):
    """``dW = g`` without momentum, ``dW = m_t`` with it, ``dW = g + mu * m_t`` with Nesterov momentum (refined)."""

    exact = (
        "Without momentum: a constant gradient (with weight decay for s = 1, else up to O((lr wd s)^2)). "
        "With momentum: a momentum buffer at its fixed point; always equal to the last displacement at a "
        "constant learning rate."
    )
    source = "arXiv 2312.00839, Table I (SGDM); momentum as in torch.optim.SGD; decayed: FTPipe (ATC'21) with Nesterov added"
    stepper = SgdStepper()

    def needs_grad(self, group: Group, kind: str) -> bool:
        """Plain SGD has no other memory of its step; refined Nesterov adds the gradient to the buffer."""
        if kind == "decayed":
            return False
        return _momentum(group) is None or (kind == "refined" and bool(group["nesterov"]))

    def move(self, weight: Tensor, state: State, grad: Tensor | None, group: Group, ahead: Ahead) -> Move | None:
        """See the class."""
        momentum = _momentum(group)
        if momentum is None:
            return None if grad is None or ahead.kind == "decayed" else _along_gradient(grad, group, ahead)
        buffer = state.get("momentum_buffer")
        if buffer is None:
            return None
        nesterov = bool(group["nesterov"])
        if ahead.kind == "decayed":
            first = 2 if nesterov else 1  # zeros enter: buf <- mu buf, and Nesterov steps along mu buf
            return Move((Term(ahead.decaying_sum(momentum, first_power=first), buffer),))
        if ahead.kind == "refined" and nesterov and grad is not None:  # torch steps along g + mu * buf
            along = _along_gradient(grad, group, ahead)
            return Move((*along.terms, Term(ahead.lr_sum * momentum, buffer)), along.keep)
        return Move((Term(ahead.lr_sum, buffer),))


def _momentum(group: Group) -> Scalar | None:
    """mu, or None for plain SGD."""
    momentum = scalar(group["momentum"])
    return momentum if isinstance(momentum, Tensor) or momentum != 0 else None


def _along_gradient(grad: Tensor, group: Group, ahead: Ahead) -> Move:
    """``g`` with the maximize sign; refined adds the coupled decay ``wd * W_t`` (as a factor of W, without a temporary)."""
    rate = ahead.lr_sum
    keep = 1.0 - rate * scalar(group["weight_decay"]) if ahead.kind == "refined" else 1.0
    return Move((Term(-rate if group["maximize"] else rate, grad),), keep)
