"""NAdam: Adam whose numerator mixes the last gradient with the momentum that the next step will use."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeoptim.rules.adam import first_moment, moments_after
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
    square_root,
    steps_taken,
)
from pipeoptim.rules.registry import Rule, register_rule


@register_rule(torch.optim.NAdam)
class NAdamRule(Rule):
    """``dW = ((1-mu_t)/(1-P_t) g + mu_{t+1}/(1-P_t mu_{t+1}) m) / (sqrt(v_hat) + eps)``, P_t = mu_1 ... mu_t.

    Where the last gradient is gone, its running mean m/(1-b1^t) stands in for it.
    """

    exact = (
        "Equal to the last displacement at a constant learning rate without weight decay. Under a "
        "gradient that was constant from the first update on, v_hat = g^2 is exact and mu_t drifts by at "
        "most 4 % of b1 per 1/momentum_decay updates."
    )
    source = "torch.optim.NAdam; Dozat 2016; prediction form of arXiv 2312.00839"

    def needs_grad(self, group: Group, kind: str) -> bool:
        """The gradient is half of the step."""
        return kind != "decayed"

    def move(self, weight: Tensor, state: State, grad: Tensor | None, group: Group, ahead: Ahead) -> Move | None:
        """See the class."""
        t = steps_taken(state)
        if t is None:
            return None
        beta1, beta2 = (scalar(beta) for beta in group["betas"])
        product = scalar(state["mu_product"])
        root, eps = state["exp_avg_sq"], scalar(group["eps"])
        if ahead.kind == "decayed":
            return _decayed_move(state["exp_avg"], root, t, beta1, beta2, product, group, ahead)
        coupled = ahead.kind == "refined" and not group["decoupled_weight_decay"]
        mu, mu_next = _mu(beta1, t, group), _mu(beta1, t + 1, group)
        of_grad = ahead.lr_sum * (1 - mu) / (1 - product)
        of_mean = ahead.lr_sum * mu_next / (1 - product * mu_next)
        divisor = square_root(1 - beta2**t)
        keep = decoupled_keep(group, ahead, decay=bool(group["decoupled_weight_decay"]))
        if grad is None:  # the running mean stands in for the last gradient, so both terms have the same value
            return Move((Term(of_grad / (1 - beta1**t) + of_mean, state["exp_avg"], root, divisor, eps),), keep)
        last = gradient(weight, grad, group, decay=coupled)
        return Move((Term(of_grad, last, root, divisor, eps), Term(of_mean, state["exp_avg"], root, divisor, eps)), keep)

    def momentum(self, weight: Tensor, state: State, group: Group) -> Momentum | None:
        """See `Rule`."""
        return first_moment(state, group, decay=not group["decoupled_weight_decay"])

    def dry_step(self, weight: Tensor, state: State, grad: Tensor, group: Group, ahead: Ahead) -> Move | None:
        """See `Rule`."""
        if "exp_avg" not in state:
            return None
        g = gradient(weight, grad, group, decay=not group["decoupled_weight_decay"])
        after = moments_after(state, g, group)
        mu = _mu(scalar(group["betas"][0]), after["step"], group)
        after["mu_product"] = state["mu_product"] * mu  # in the type of the state, as torch rounds it
        return self.move(weight, after, grad, group, ahead.from_state_after())


def _mu(beta1: Scalar, t: Scalar, group: Group) -> Scalar:
    """Momentum of update t: rises from b1/2 to b1."""
    return beta1 * (1.0 - 0.5 * 0.96 ** (t * float(group["momentum_decay"])))


def _decayed_move(
    first: Tensor,
    root: Tensor,
    t: Scalar,
    beta1: Scalar,
    beta2: Scalar,
    product: Scalar,
    group: Group,
    ahead: Ahead,
) -> Move:
    """Zero gradients ahead: only the momentum part is left, m fades by b1 per update, v is kept."""
    eps = scalar(group["eps"])
    terms: list[Term] = []
    for i, lr in enumerate(ahead.rates, start=1):
        product = product * _mu(beta1, t + i, group)
        mu_next = _mu(beta1, t + i + 1, group)
        scale = lr * mu_next * beta1**i / (1 - product * mu_next)
        terms.append(Term(scale, first, root, square_root(1 - beta2 ** (t + i)), eps))
    return Move(tuple(terms), decoupled_keep(group, ahead, decay=bool(group["decoupled_weight_decay"])))
