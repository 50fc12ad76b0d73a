"""The seam between rules and whoever predicts: the one place where a rule is asked for a move."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeoptim.errors import ConfigError
from pipeoptim.rules.checks import check_dense
from pipeoptim.rules.dry_step import DryStepKernel, predict_by_dry_step
from pipeoptim.rules.entries import ParameterEntry
from pipeoptim.rules.horizon import Horizon
from pipeoptim.rules.interpreters import ApplyMode, MoveBatch
from pipeoptim.rules.move import Ahead, Move, State, as_real


def ask_rule(entry: ParameterEntry, grad: Tensor | None, ahead: Ahead) -> Move | None:
    """Where the weight of `entry` goes, scaled as `ahead` says; None if it stays. Call it under ``torch.no_grad()``.

    The plain path asks here for every parameter; the fused one asks `scaled_move`, once for all parameters that share their numbers.
    """
    check_dense(entry.weight, grad)
    if grad is None:
        if not entry.weight.requires_grad:  # frozen: it had updates once, it gets none now
            return None
    elif grad.requires_grad:  # from a backward with create_graph=True
        grad = grad.detach()
    grad = None if grad is None else as_real(grad)
    return scaled_move(entry, entry.real_weight, entry.real_state, grad, ahead)


def scaled_move(entry: ParameterEntry, weight: Tensor, state: State, grad: Tensor | None, ahead: Ahead) -> Move | None:
    """As `ask_rule`, of a weight, state and gradient that are as rules see them."""
    assert entry.rule is not None
    move = entry.rule.move(weight, state, grad, entry.group, ahead)
    return None if move is None else move.scaled(ahead.scale)


@torch.no_grad()
def predict_by_rule(
    entries: Sequence[ParameterEntry],
    grads: Sequence[Tensor | None],
    horizon: Horizon,
    out: Sequence[Tensor],
    mode: ApplyMode = "auto",
    dry_kernel: DryStepKernel | None = None,
) -> None:
    """Write ``W_hat(t+s)`` of every parameter into its buffer; those by displacement are left to the caller.

    Args:
        entries: of the parameters, from `parameter_entries`.
        grads: the last gradient of each, where it is known.
        horizon: what to predict from.
        out: one buffer per parameter.
        mode: how to compute it.
        dry_kernel: what predicts from a mini-batch in progress in one pass, where it can.
    """
    if len(out) != len(entries):
        raise ConfigError(f"{len(out)} buffers for {len(entries)} parameters: pass one buffer per parameter")
    batch = MoveBatch(mode)
    predict_by_dry_step(entries, horizon, out, batch, dry_kernel)
    for entry, grad, buffer in zip(entries, grads, out, strict=True):
        if entry.kind == "displacement" or entry.in_progress:
            continue
        move = None if entry.kind == "none" else ask_rule(entry, grad, horizon.ahead(entry))
        if move is None:
            buffer.copy_(entry.weight)
        else:
            batch.add(entry.real_weight, move, as_real(buffer.detach()))
    batch.flush()
