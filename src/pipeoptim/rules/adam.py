"""Adam and AdamW: the bias-corrected first moment over the root of the bias-corrected second."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
    mean_square_after,
    raw_momentum,
    scalar,
    square_root,
    steps_after,
    steps_taken,
)
from pipeoptim.rules.registry import Rule, register_rule


@register_rule(torch.optim.Adam, torch.optim.AdamW)
class AdamRule(Rule):
    """``dW = m_hat / (sqrt(v_hat) + eps)``, m_hat = m/(1-b1^t), v_hat = v/(1-b2^t).

    Coupled weight decay and maximize are in m and v already. Refined adds decoupled decay (linear in s) and
    takes the maximum of v with amsgrad; paper leaves both out.
    """

    exact = (
        "A gradient that was constant from the first update on (then m_hat = g, v_hat = g^2 at every t); "
        "with decoupled decay for s = 1, else up to O((lr wd s)^2). Equal to the last displacement at a "
        "constant learning rate, up to decoupled decay, which uses W_t here and W_{t-1} there."
    )
    source = "arXiv 2312.00839, Table I (Adam, AdamW); denominator as in torch.optim.Adam; decayed: FTPipe (ATC'21)"
    stepper = AdamStepper()

    def move(self, weight: Tensor, state: State, grad: Tensor | None, group: Group, ahead: Ahead) -> Move | None:
        """See the class."""
        t = steps_taken(state)
        if t is None:
            return None
        beta1, beta2 = (scalar(beta) for beta in group["betas"])
        second = state["exp_avg_sq"]  # the state's own tensor: the fused path recognises terms by identity
        if group["amsgrad"] and ahead.kind != "paper":
            second = state.get("max_exp_avg_sq", second)
        if ahead.kind == "decayed":
            return _decayed_move(state["exp_avg"], second, t, beta1, beta2, group, ahead)
        term = Term(
            ahead.lr_sum / (1 - beta1**t),
            state["exp_avg"],
            second,
            square_root(1 - beta2**t),
            scalar(group["eps"]),
        )
        return Move((term,), decoupled_keep(group, ahead, decay=_is_decoupled(group)))

    def momentum(self, weight: Tensor, state: State, group: Group) -> Momentum | None:
        """See `Rule`."""
        return first_moment(state, group, decay=not _is_decoupled(group))

    def dry_step(self, weight: Tensor, state: State, grad: Tensor, group: Group, ahead: Ahead) -> Move | None:
        """See `Rule`."""
        if "exp_avg" not in state:
            return None
        g = gradient(weight, grad, group, decay=not _is_decoupled(group))
        after = moments_after(state, g, group)
        if group["amsgrad"]:
            after["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], after["exp_avg_sq"])
        return self.move(weight, after, grad, group, ahead.from_state_after())


def first_moment(state: State, group: Group, *, decay: bool) -> Momentum | None:
    """``m_hat`` = m/(1-b1^t), for the whole family; `decay`: coupled weight decay is in it. None before the first update."""
    t = steps_taken(state)
    if t is None:
        return None
    return raw_momentum(state["exp_avg"], 1 / (1 - scalar(group["betas"][0]) ** t), group, decay=decay)


def moments_after(state: State, g: Tensor, group: Group) -> dict[str, Any]:
    """Adam's state after an update with what enters it as `g`."""
    beta1, beta2 = (scalar(beta) for beta in group["betas"])
    return {
        "step": steps_after(state),
        "exp_avg": state["exp_avg"].lerp(g, 1 - beta1),
        "exp_avg_sq": mean_square_after(state["exp_avg_sq"], g, beta2),
    }


def _is_decoupled(group: Group) -> bool:
    return bool(group.get("decoupled_weight_decay", False))


def _decayed_move(first: Tensor, second: Tensor, t: Scalar, beta1: Scalar, beta2: Scalar, group: Group, ahead: Ahead) -> Move:
    """Zero gradients ahead: m fades by b1 per update, v is kept; each update decays the weight before it steps."""
    weight_decay = scalar(group["weight_decay"]) if _is_decoupled(group) else 0.0
    eps = scalar(group["eps"])
    keep: Scalar = 1.0
    terms: list[Term] = []
    # From the last update to the first: each term is shrunk by the decays of all later updates, which `keep` accumulates.
    for i, lr in reversed(list(enumerate(ahead.rates, start=1))):
        scale = keep * lr * beta1**i / (1 - beta1 ** (t + i))  # later decays shrink this step, too
        terms.append(Term(scale, first, second, square_root(1 - beta2 ** (t + i)), eps))
        keep = keep * (1 - lr * weight_decay)
    return Move(tuple(reversed(terms)), keep)
