"""Walks over the param groups of an optimizer, asks the rule where each weight goes, and has it written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pipeoptim.errors import ConfigError
from pipeoptim.rules.checks import check_dense, check_group
from pipeoptim.rules.lr import next_rates
from pipeoptim.rules.move import Ahead, Group, State
from pipeoptim.rules.registry import Rule
from pipeoptim.rules.write import Mode, Writer


def parameters(optimizer: Optimizer) -> list[Tensor]:
    """All parameters in param_groups order: the order of every list of weights in this package."""
    return [weight for group in optimizer.param_groups for weight in group["params"]]


@torch.no_grad()
def write_by_rule(
    rule: Rule,
    optimizer: Optimizer,
    grads: Sequence[Tensor | None],
    steps: int,
    kind: str,
    scheduler: LRScheduler | None,
    out: Sequence[Tensor],
    mode: Mode = "auto",
) -> None:
    """Write ``W_hat(t + steps)`` of every parameter into `out` (one buffer per parameter, param_groups order)."""
    if len(out) != len(grads):
        raise ConfigError(f"{len(out)} buffers for {len(grads)} parameters: pass one buffer per parameter")
    rates = next_rates(optimizer, None if kind == "paper" else scheduler, steps)
    pairs = iter(zip(grads, out, strict=True))
    writer = Writer(mode)
    for group, group_rates in zip(optimizer.param_groups, rates, strict=True):
        check_group(group)
        ahead = Ahead(kind, group_rates)
        for weight in group["params"]:
            grad, buffer = next(pairs)
            _put(writer, rule, weight, optimizer.state.get(weight, {}), grad, group, ahead, buffer)
    writer.flush()


def _put(
    writer: Writer,
    rule: Rule,
    weight: Tensor,
    state: State,
    grad: Tensor | None,
    group: Group,
    ahead: Ahead,
    out: Tensor,
) -> None:
    check_dense(weight, grad)
    if not weight.requires_grad and grad is None:  # frozen: it had updates once, it gets none now
        out.copy_(weight)
        return
    weight, out = _real(weight.detach()), _real(out.detach())
    move = rule.move(weight, _real_state(state), None if grad is None else _real(grad.detach()), group, ahead)
    if move is None:
        out.copy_(weight)
    else:
        writer.put(weight, move, out)


def _real(tensor: Tensor) -> Tensor:
    """Complex tensors as pairs of reals, as torch's own optimizers treat them."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _real_state(state: State) -> State:
    if not any(isinstance(value, Tensor) and value.is_complex() for value in state.values()):
        return state
    real: dict[str, Any] = {k: _real(v) if isinstance(v, Tensor) else v for k, v in state.items()}
    return real
