"""RAdam: momentum alone while the second moment is not trustworthy, rectified Adam afterwards."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from pipeoptim.kernels import calls
from pipeoptim.rules.adam import first_moment, moments_after
from pipeoptim.rules.fused.steppers import AdamStepper
from pipeoptim.rules.move import (
    Ahead,
    Group,
    Momentum,
    Move,
    Scalar,
    State,
    Term,
    decoupled_keep,
    gradient,
    scalar,
    steps_taken,
)
from pipeoptim.rules.registry import Rule, register_rule


class RAdamStepper(AdamStepper):
    """Adam's step with another rate and divisor, once it is rectified: torch itself takes the few steps before."""

    def supports_step(self, group: Group, t: float) -> bool:
        """See the class."""
        return _rectified(t, float(group["betas"][1])) is not None

    def coefficients(self, group: Group, t: float, prediction: calls.KernelPrediction | None) -> calls.AdamCoefficients:
        """See the class."""
        factor = _rectified(t, float(group["betas"][1]))
        assert factor is not None
        adam = super().coefficients(group, t, prediction)
        return replace(adam, rate=adam.rate * factor, inverse=1.0)


@register_rule(torch.optim.RAdam)
class RAdamRule(Rule):
    """``dW = m_hat * rect_t * sqrt(1-b2^t) / (sqrt(v) + eps)``, or ``dW = m_hat`` while rho_t <= 5."""

    exact = (
        "Equal to the last displacement at a constant learning rate, up to decoupled decay. Under a "
        "gradient that was constant from the first update on, exact within the first phase (rho_t <= 5); "
        "later up to the growth of rect_t."
    )
    source = "torch.optim.RAdam; Liu et al., arXiv 1908.03265; prediction form of arXiv 2312.00839"
    stepper = RAdamStepper()

    def move(self, weight: Tensor, state: State, grad: Tensor | None, group: Group, ahead: Ahead) -> Move | None:
        """See the class."""
        taken = steps_taken(state)
        if taken is None:
            return None
        t = float(taken)  # which phase it is decides about the formula, so the count has to be read
        beta1 = scalar(group["betas"][0])
        if ahead.kind == "decayed":
            terms = tuple(
                _term(lr * beta1**i / (1 - beta1 ** (t + i)), t + i, state, group) for i, lr in enumerate(ahead.rates, start=1)
            )
        else:
            terms = (_term(ahead.lr_sum / (1 - beta1**t), t, state, group),)
        return Move(terms, decoupled_keep(group, ahead, decay=bool(group["decoupled_weight_decay"])))

    def momentum(self, weight: Tensor, state: State, group: Group) -> Momentum | None:
        """See `Rule`."""
        return first_moment(state, group, decay=not group["decoupled_weight_decay"])

    def dry_step(self, weight: Tensor, state: State, grad: Tensor, group: Group, ahead: Ahead) -> Move | None:
        """See `Rule`."""
        if "exp_avg" not in state:
            return None
        g = gradient(weight, grad, group, decay=not group["decoupled_weight_decay"])
        after = moments_after(state, g, group)
        return self.move(weight, after, grad, group, ahead.from_state_after())


def _term(scale: Scalar, t: float, state: State, group: Group) -> Term:
    """The step of update t with coefficient `scale` before the momentum."""
    factor = _rectified(t, float(scalar(group["betas"][1])))
    if factor is None:
        return Term(scale, state["exp_avg"])
    return Term(scale * factor, state["exp_avg"], state["exp_avg_sq"], 1.0, scalar(group["eps"]))


def _rectified(t: float, beta2: float) -> float | None:
    """``rect_t * sqrt(1-b2^t)``, or None while the variance is intractable."""
    rho_inf = 2 / (1 - beta2) - 1
    correction = 1 - beta2**t
    rho = rho_inf - 2 * t * beta2**t / correction
    if rho <= 5.0:
        return None
    return math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)) * math.sqrt(correction)
