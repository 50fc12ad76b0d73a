"""The seam between rules and whoever predicts: the one place where a rule is asked for a move."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeoptim.errors import ConfigError
from pipeoptim.rules.checks import check_dense
from pipeoptim.rules.entries import ParameterEntry
from pipeoptim.rules.horizon import Horizon
from pipeoptim.rules.interpreters import ApplyMode, MoveBatch
from pipeoptim.rules.move import Ahead, Move


def ask_rule(entry: ParameterEntry, grad: Tensor | None, ahead: Ahead) -> Move | None:
    """Where the weight of `entry` goes, scaled as `ahead` says; None if it stays. Call it under ``torch.no_grad()``.

    Both paths ask here: the plain one for every parameter, the fused one once for all parameters that share their numbers.
    """
    weight, state = entry.weight, entry.state
    check_dense(weight, grad)
    if grad is None:
        if not weight.requires_grad:  # frozen: it had updates once, it gets none now
            return None
    elif grad.requires_grad:  # from a backward with create_graph=True
        grad = grad.detach()
    if weight.is_complex():
        weight, state = _as_real(weight), {k: _as_real(v) if isinstance(v, Tensor) else v for k, v in state.items()}
        grad = None if grad is None else _as_real(grad)
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
) -> None:
    """Write ``W_hat(t+s)`` of every parameter into its buffer; those by displacement are left to the caller.

    Args:
        entries: of the parameters, from `parameter_entries`.
        grads: the last gradient of each, where it is known.
        horizon: what to predict from.
        out: one buffer per parameter.
        mode: how to compute it.
    """
    if len(out) != len(entries):
        raise ConfigError(f"{len(out)} buffers for {len(entries)} parameters: pass one buffer per parameter")
    batch = MoveBatch(mode)
    for entry, grad, buffer in zip(entries, grads, out, strict=True):
        if entry.kind == "displacement":
            continue
        move = None if entry.kind == "none" else ask_rule(entry, grad, horizon.ahead(entry))
        if move is None:
            buffer.copy_(entry.weight)
        else:
            batch.add(_as_real(entry.weight.detach()), move, _as_real(buffer.detach()))
    batch.flush()


def _as_real(tensor: Tensor) -> Tensor:
    """Complex tensors as pairs of reals, as torch's own optimizers treat them."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
