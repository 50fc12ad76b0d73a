"""Rotated Adam: Adam's rule in the basis that the optimizer keeps, turned back into that of the weight."""

from __future__ import annotations

from torch import Tensor

from pipeoptim.optim.eigenbasis import rotated, rotated_back
from pipeoptim.optim.rotated_adam import RotatedAdam, bases_of
from pipeoptim.rules.adam import AdamRule
from pipeoptim.rules.move import Ahead, Group, Momentum, Move, State, Term, mean_square_after, steps_after
from pipeoptim.rules.registry import Rule, register_rule

_ADAM = AdamRule()


@register_rule(RotatedAdam)
class RotatedAdamRule(Rule):
    """``dW = U [m_hat / (sqrt(v_hat) + eps)] V^T`` with m = U^T M V, in the bases of the last update; AdamW's where none is rotated.

    Four matrix products, as many as in the optimizer's own step. The last displacement (``prediction="displacement"``) is the same at
    a constant learning rate without weight decay, and nearly free.
    """

    elementwise = False
    exact = (
        "A gradient that was constant from the first update on, since its eigenbasis stays (then U^T M V is diagonal, and Adam's rule is "
        "exact on it); with weight decay for s = 1, else up to O((lr wd s)^2). Equal to the last displacement at a constant learning "
        "rate, up to decoupled decay."
    )
    source = "arXiv 2602.03515 (the optimizer); prediction form of arXiv 2312.00839; decayed: FTPipe (ATC'21)"

    def move(self, weight: Tensor, state: State, grad: Tensor | None, group: Group, ahead: Ahead) -> Move | None:
        """See the class."""
        bases = bases_of(state)
        adamw = _as_adamw(group)
        if all(basis is None for basis in bases):
            return _ADAM.move(weight, state, grad, adamw, ahead)
        turned = {**state, "exp_avg": rotated(state["exp_avg"], *bases)}
        move = _ADAM.move(weight, turned, grad, adamw, ahead)
        if move is None:
            return None
        # The terms of one move share their numerator: added before they are turned back, since each turn costs two products.
        step = sum((_step_of(term) for term in move.terms[1:]), _step_of(move.terms[0]))
        return Move((Term(1.0, rotated_back(step, *bases).to(weight.dtype)),), move.keep)

    def momentum(self, weight: Tensor, state: State, group: Group) -> Momentum | None:
        """See `Rule`: in the basis of the weight, whether it is rotated or not."""
        return _ADAM.momentum(weight, state, _as_adamw(group))

    def dry_step(self, weight: Tensor, state: State, grad: Tensor, group: Group, ahead: Ahead) -> Move | None:
        """See `Rule`. An update that refreshes its bases is left to the optimizer's own step, on copies."""
        bases = bases_of(state)
        if all(basis is None for basis in bases):
            return _ADAM.dry_step(weight, state, grad, _as_adamw(group), ahead)
        t, g = steps_after(state), grad.to(state["exp_avg"].dtype)
        if int(t) % group["refresh_every"] == 0:
            return None
        beta1, beta2 = group["betas"]
        second = mean_square_after(state["exp_avg_sq"], rotated(g, *bases), beta2)
        after = {**state, "step": t, "exp_avg": state["exp_avg"].lerp(g, 1 - beta1), "exp_avg_sq": second}
        return self.move(weight, after, grad, group, ahead.from_state_after())


def _as_adamw(group: Group) -> Group:
    return {**group, "amsgrad": False, "maximize": False, "decoupled_weight_decay": True}


def _step_of(term: Term) -> Tensor:
    assert term.root is not None
    return term.value * term.scale / (term.root.sqrt() / term.root_divisor + term.eps)
