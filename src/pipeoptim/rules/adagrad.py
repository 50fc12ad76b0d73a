"""Adagrad: the gradient over the root of the sum of all squared gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeoptim.rules.fused.steppers import RootStepper
from pipeoptim.rules.move import Ahead, Group, Move, State, Term, gradient, scalar, steps_after, steps_taken, total
from pipeoptim.rules.registry import Rule, register_rule


class AdagradStepper(RootStepper):
    """All squares are kept; the rate may fall."""

    def decay_gain_rate(self, group: Group, t: float) -> tuple[float, float, float]:
        """See the class."""
        return 1.0, 1.0, float(group["lr"]) / (1 + (t - 1) * group["lr_decay"])


@register_rule(torch.optim.Adagrad)
class AdagradRule(Rule):
    """``dW = g / (sqrt(sum) + eps)``; refined lets the rates ``lr_i / (1 + (t+i-1) lr_decay)`` fall on."""

    exact = (
        "Equal to the last displacement at a constant learning rate without weight decay and lr_decay. "
        "Under a constant gradient it overshoots by a relative s g^2 / (2 sum) at most, because the sum grows "
        "and the prediction holds it constant."
    )
    source = "torch.optim.Adagrad; Duchi et al. 2011; prediction form of arXiv 2312.00839"
    no_decayed = "Adagrad keeps no momentum that could decay"
    stepper = AdagradStepper("sum")

    def needs_grad(self, group: Group, kind: str) -> bool:
        """The state holds squares only."""
        return True

    def move(self, weight: Tensor, state: State, grad: Tensor | None, group: Group, ahead: Ahead) -> Move | None:
        """See the class."""
        t = steps_taken(state)
        if t is None or grad is None:
            return None
        refined = ahead.kind == "refined"
        lr_decay = group["lr_decay"]
        # Updates before the one that uses the rate.
        fall = [t + ahead.first - 1 + i if refined else t - 1 for i in range(ahead.steps)]
        rate = total([lr / (1 + before * lr_decay) for lr, before in zip(ahead.rates, fall, strict=True)])
        value = gradient(weight, grad, group, decay=refined)
        return Move((Term(rate, value, state["sum"], 1.0, scalar(group["eps"])),))

    def dry_step(self, weight: Tensor, state: State, grad: Tensor, group: Group, ahead: Ahead) -> Move | None:
        """See `Rule`."""
        if "sum" not in state:
            return None
        g = gradient(weight, grad, group, decay=True)
        after = {"step": steps_after(state), "sum": state["sum"].addcmul(g, g)}
        return self.move(weight, after, grad, group, ahead.from_state_after())
