"""Walks over the parameters of an optimizer, asks the rule of each where it goes, and has it written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pipeoptim.errors import ConfigError
from pipeoptim.rules.checks import check_dense, check_group, check_kind
from pipeoptim.rules.combined import members
from pipeoptim.rules.interpreters import ApplyMode, MoveBatch
from pipeoptim.rules.move import Ahead, Group, Scalar, State
from pipeoptim.rules.registry import Rule, find_rule

RULE_KINDS = ("refined", "paper", "decayed")
"""Kinds for which a rule is asked; the others know nothing of the optimizer."""


@dataclass(frozen=True, slots=True)
class ParameterEntry:
    """One parameter, with what moves it.

    Attributes:
        weight: what is predicted: the parameter, or what this process holds of it.
        owner: the parameter as the optimizer knows it.
        kind: how it is predicted: of its param group, where that has an entry "prediction", else of the whole; "displacement"
            where there is no rule.
        group_number: place of its group among all groups.
    """

    weight: Tensor
    owner: Tensor
    optimizer: Optimizer
    group: Group
    group_number: int
    rule: Rule | None
    kind: str

    @property
    def state(self) -> State:
        """What the optimizer remembers of this parameter; empty before its first update."""
        state: State = self.optimizer.state.get(self.owner, {})
        return state if self.owner is self.weight else {name: local_part(value) for name, value in state.items()}

    @property
    def needs_grad(self) -> bool:
        """Whether its prediction needs the last gradient."""
        return self.kind in RULE_KINDS and self.rule is not None and self.rule.needs_grad(self.group, self.kind)


def local_part(value: Any) -> Any:
    """Of a distributed tensor the part in this process; anything else as it is."""
    return value.to_local() if hasattr(value, "to_local") else value


def parameter_entries(
    optimizer: Optimizer, kind: str, parts: Mapping[Tensor, Tensor] = MappingProxyType({})
) -> list[ParameterEntry]:
    """All parameters in param_groups order: the order of every list of weights in this package.

    Args:
        optimizer, kind: see `predict_weights`.
        parts: what this process holds of a parameter, where that is not all of it.

    Raises:
        ConfigError: an unknown kind, one that an optimizer does not offer, or an optimizer that cannot be predicted.
    """
    found: list[ParameterEntry] = []
    number = 0
    for member in members(optimizer):
        rule = find_rule(member)
        for group in member.param_groups:
            wanted = group.get("prediction", kind)
            check_kind(wanted, rule, member)
            check_group(group)
            chosen = "displacement" if rule is None and wanted in RULE_KINDS else wanted
            if parts and rule is not None and chosen in RULE_KINDS and not rule.elementwise:
                raise ConfigError(
                    f"{type(member).__name__} moves each matrix as a whole, of which this process holds a part; "
                    'use prediction="displacement"'
                )
            found += [ParameterEntry(parts.get(p, p), p, member, group, number, rule, chosen) for p in group["params"]]
            number += 1
    return found


def parameters(optimizer: Optimizer) -> list[Tensor]:
    """All parameters in param_groups order."""
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def rates_for(kind: str, rates: tuple[Scalar, ...]) -> tuple[Scalar, ...]:
    """The rates of the next updates as `kind` sees them: the paper knows of no schedule."""
    return (rates[0],) * len(rates) if kind == "paper" else rates


@torch.no_grad()
def predict_by_rule(
    parts: Sequence[ParameterEntry],
    grads: Sequence[Tensor | None],
    rates: Sequence[tuple[Scalar, ...]],
    out: Sequence[Tensor],
    mode: ApplyMode = "auto",
) -> None:
    """Write ``W_hat(t+s)`` of every parameter into its buffer; those by displacement are left to the caller.

    Args:
        parts: from `parameter_entries`.
        grads: the last gradient of each, where it is known.
        rates: for each param group the learning rates of the next s updates.
        out: one buffer per parameter.
        mode: how to compute it.
    """
    if len(out) != len(parts):
        raise ConfigError(f"{len(out)} buffers for {len(parts)} parameters: pass one buffer per parameter")
    batch = MoveBatch(mode)
    for item, grad, buffer in zip(parts, grads, out, strict=True):
        if item.kind == "none":
            buffer.copy_(item.weight)
        elif item.kind != "displacement":
            _put(batch, item, grad, Ahead(item.kind, rates_for(item.kind, rates[item.group_number])), buffer)
    batch.flush()


def _put(batch: MoveBatch, item: ParameterEntry, grad: Tensor | None, ahead: Ahead, out: Tensor) -> None:
    check_dense(item.weight, grad)
    if not item.weight.requires_grad and grad is None:  # frozen: it had updates once, it gets none now
        out.copy_(item.weight)
        return
    assert item.rule is not None
    weight, out = _real(item.weight.detach()), _real(out.detach())
    grad = None if grad is None else _real(grad.detach())
    move = item.rule.move(weight, _real_state(item.state), grad, item.group, ahead)
    if move is None:
        out.copy_(weight)
    else:
        batch.add(weight, move, out)


def _real(tensor: Tensor) -> Tensor:
    """Complex tensors as pairs of reals, as torch's own optimizers treat them."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _real_state(state: State) -> State:
    if not any(isinstance(value, Tensor) and value.is_complex() for value in state.values()):
        return state
    real: dict[str, Any] = {k: _real(v) if isinstance(v, Tensor) else v for k, v in state.items()}
    return real
