"""Weights that are not finite: no run recovers from them, so they are neither saved nor resumed from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipeoptim.engine.pipeline import Pipeline


def sick_weight(pipe: Pipeline) -> tuple[int, str] | None:
    """Stage and name of the first parameter in this process that is not finite; None if all are."""
    for k in pipe.local_stages:
        name = _first_not_finite(pipe.stage_module(k).named_parameters())
        if name is not None:
            return k, name
    return None


def sick_entry(state: Mapping[str, Any], module: nn.Module) -> str | None:
    """As :func:`sick_weight` for the saved state of one stage. Buffers may well hold infinity (masks do), so ``module`` says which
    entries are parameters."""
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return _first_not_finite((name, tensor) for name, tensor in state["module"].items() if name in parameters)


def _first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    return next((name for name, tensor in tensors if not bool(torch.isfinite(tensor.detach()).all())), None)
