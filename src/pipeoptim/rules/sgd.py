"""SGD: the gradient, the momentum buffer, or both with Nesterov momentum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeoptim.rules.fused.steppers import SgdStepper
from pipeoptim.rules.move import Ahead, Group, Momentum, Move, Scalar, State, Term, gradient, raw_momentum, scalar
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

    def momentum(self, weight: Tensor, state: State, group: Group) -> Momentum | None:
        """See `Rule`: the buffer's fixed point under a constant gradient; without a count of steps its start stays uncorrected."""
        mu, buffer, gain = _momentum(group), state.get("momentum_buffer"), 1 - scalar(group["dampening"])
        if mu is None or buffer is None or (not isinstance(gain, Tensor) and gain == 0):
            return None
        return raw_momentum(buffer, (1 - mu) / gain, group, decay=True)

    def dry_step(self, weight: Tensor, state: State, grad: Tensor, group: Group, ahead: Ahead) -> Move | None:
        """See `Rule`."""
        after: dict[str, Any] = {}
        mu, buffer = _momentum(group), state.get("momentum_buffer")
        if mu is not None:
            g = gradient(weight, grad, group, decay=True)
            # torch's first step takes the gradient whole, whatever the dampening.
            after["momentum_buffer"] = g if buffer is None else (buffer * mu).add_(g * (1 - scalar(group["dampening"])))
        return self.move(weight, after, grad, group, ahead.from_state_after())


def _momentum(group: Group) -> Scalar | None:
    """mu, or None for plain SGD."""
    momentum = scalar(group["momentum"])
    return momentum if isinstance(momentum, Tensor) or momentum != 0 else None


def _along_gradient(grad: Tensor, group: Group, ahead: Ahead) -> Move:
    """``g`` with the maximize sign; refined adds the coupled decay ``wd * W_t`` (as a factor of W, without a temporary)."""
    rate = ahead.lr_sum
    keep = 1.0 - rate * scalar(group["weight_decay"]) if ahead.kind == "refined" else 1.0
    return Move((Term(-rate if group["maximize"] else rate, grad),), keep)
