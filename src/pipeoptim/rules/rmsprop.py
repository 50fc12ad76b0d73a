"""RMSprop: the normalized gradient, or a momentum buffer of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeoptim.rules.fused.steppers import RootStepper
from pipeoptim.rules.move import (
    Ahead,
    Group,
    Momentum,
    Move,
    State,
    Term,
    gradient,
    mean_square_after,
    raw_momentum,
    scalar,
    steps_after,
    steps_taken,
)
from pipeoptim.rules.registry import Rule, register_rule


class RMSpropStepper(RootStepper):
    """A running mean of squares, not centered and without momentum."""

    def supports(self, group: Group) -> bool:
        """See the class."""
        return super().supports(group) and not group["centered"] and group["momentum"] == 0

    def decay_gain_rate(self, group: Group, t: float) -> tuple[float, float, float]:
        """See the class."""
        return float(group["alpha"]), 1.0 - float(group["alpha"]), float(group["lr"])


@register_rule(torch.optim.RMSprop)
class RMSpropRule(Rule):
    """``dW = g / (sqrt(v) + eps)`` without momentum, ``dW = buf`` with it; centered: ``v - (mean of g)^2`` for v."""

    exact = (
        "Equal to the last displacement at a constant learning rate (without momentum: and without weight "
        "decay). Under a constant gradient exact once v has converged (after several 1/(1-alpha) updates)."
    )
    source = "torch.optim.RMSprop; Tieleman and Hinton 2012; prediction form of arXiv 2312.00839, whose code has it too"
    stepper = RMSpropStepper("square_avg")

    def needs_grad(self, group: Group, kind: str) -> bool:
        """Without momentum the state holds squares only."""
        return group["momentum"] == 0 and kind != "decayed"

    def move(self, weight: Tensor, state: State, grad: Tensor | None, group: Group, ahead: Ahead) -> Move | None:
        """See the class. Decayed without momentum: zero gradients ahead move nothing."""
        if steps_taken(state) is None:
            return None
        if group["momentum"] > 0:
            rate = ahead.decaying_sum(scalar(group["momentum"])) if ahead.kind == "decayed" else ahead.lr_sum
            return Move((Term(rate, state["momentum_buffer"]),))
        if grad is None or ahead.kind == "decayed":
            return None
        root = state["square_avg"]
        if group["centered"]:
            # The one temporary of this rule: the variance is no tensor of the state.
            root = root.addcmul(state["grad_avg"], state["grad_avg"], value=-1)
        value = gradient(weight, grad, group, decay=ahead.kind == "refined")
        return Move((Term(ahead.lr_sum, value, root, 1.0, scalar(group["eps"])),))

    def momentum(self, weight: Tensor, state: State, group: Group) -> Momentum | None:
        """See `Rule`. Centered: the mean of gradients; else that of normalized ones, times the present root."""
        t = steps_taken(state)
        if t is None:
            return None
        if group["centered"]:
            return raw_momentum(state["grad_avg"], 1 / (1 - scalar(group["alpha"]) ** t), group, decay=True)
        if group["momentum"] == 0:
            return None
        root = state["square_avg"].sqrt().add_(scalar(group["eps"]))
        return raw_momentum(root.mul_(state["momentum_buffer"]), 1 - scalar(group["momentum"]), group, decay=True)

    def dry_step(self, weight: Tensor, state: State, grad: Tensor, group: Group, ahead: Ahead) -> Move | None:
        """See `Rule`."""
        if "square_avg" not in state:
            return None
        alpha, g = scalar(group["alpha"]), gradient(weight, grad, group, decay=True)
        after: dict[str, Any] = {"step": steps_after(state), "square_avg": mean_square_after(state["square_avg"], g, alpha)}
        if group["centered"]:
            after["grad_avg"] = state["grad_avg"].lerp(g, 1 - alpha)
        if group["momentum"] > 0:
            root = after["square_avg"]
            if group["centered"]:
                root = root.addcmul(after["grad_avg"], after["grad_avg"], value=-1)
            buffer = state["momentum_buffer"] * scalar(group["momentum"])
            after["momentum_buffer"] = buffer.addcdiv_(g, root.sqrt().add_(scalar(group["eps"])))
        return self.move(weight, after, grad, group, ahead.from_state_after())
