"""Muon: the orthogonalized momentum. Predicting the raw momentum instead is worse than predicting nothing."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import _muon as torch_muon

from pipeoptim.rules.move import Ahead, Group, Momentum, Move, State, Term, decoupled_keep, scalar
from pipeoptim.rules.registry import Rule, register_rule


@register_rule(torch.optim.Muon)
class MuonRule(Rule):
    """``dW = ratio(shape) * NS(buf)``, refined Nesterov: ``NS(lerp(g, buf, mu))``; decoupled decay (refined).

    NS is torch's own Newton-Schulz iteration (bfloat16, so its result is good to about three digits).
    """

    elementwise = False
    exact = (
        "Equal to the last displacement at a constant learning rate, up to decoupled decay. A buffer at "
        "its fixed point: a constant gradient."
    )
    source = "torch.optim.Muon; Jordan et al. 2024; prediction form of arXiv 2312.00839"

    def needs_grad(self, group: Group, kind: str) -> bool:
        """Refined Nesterov mixes the last gradient in."""
        return kind == "refined" and bool(group["nesterov"])

    def move(self, weight: Tensor, state: State, grad: Tensor | None, group: Group, ahead: Ahead) -> Move | None:
        """See the class. Decayed equals paper: a fading buffer keeps its direction, and NS ignores its size."""
        buffer = state.get("momentum_buffer")
        if buffer is None:
            return None
        if grad is not None and self.needs_grad(group, ahead.kind):
            buffer = grad.lerp(buffer, group["momentum"])
        # torch's private functions rather than a copy of them: the step itself calls these, with these roundings.
        update = torch_muon._zeropower_via_newtonschulz(buffer, group["ns_coefficients"], group["ns_steps"], group["eps"])
        ratio = float(scalar(torch_muon._adjust_lr(1.0, group["adjust_lr_fn"], weight.shape)))
        return Move((Term(ahead.lr_sum * ratio, update.to(weight.dtype)),), decoupled_keep(group, ahead, decay=True))

    def momentum(self, weight: Tensor, state: State, group: Group) -> Momentum | None:
        """See `Rule`. A mean that begins at zero; without a count of steps its start stays uncorrected."""
        return None if "momentum_buffer" not in state else Momentum(state["momentum_buffer"])

    def dry_step(self, weight: Tensor, state: State, grad: Tensor, group: Group, ahead: Ahead) -> Move | None:
        """See `Rule`."""
        if "momentum_buffer" not in state:
            return None
        after = {"momentum_buffer": state["momentum_buffer"].lerp(grad, 1 - scalar(group["momentum"]))}
        return self.move(weight, after, grad, group, ahead.from_state_after())
