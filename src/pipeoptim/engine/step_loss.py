"""The loss that ``step()`` returns: detached, with a sentence for scripts that still call ``backward()`` on it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from pipeoptim.errors import ConfigError


class StepLoss(Tensor):
    """An ordinary tensor in every respect but one: what is computed from it, copied, saved or printed is a plain ``Tensor``."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # operations return plain tensors

    def backward(self, *_: Any, **__: Any) -> None:  # type: ignore[override]
        """Refused: the pipeline runs the backward itself."""
        raise ConfigError(
            "loss.backward() was called on the loss of a mini-batch, whose backward the pipeline runs itself; remove the call, and "
            "those of optimizer.step() and zero_grad()"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> Any:  # type: ignore[override]
        return repr(self.as_subclass(Tensor))

    def __format__(self, spec: str) -> str:
        return format(self.as_subclass(Tensor), spec)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return copy.deepcopy(self.as_subclass(Tensor), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def step_loss(loss: Tensor | None) -> Tensor | None:
    """``loss`` as :class:`StepLoss`: a view, 0.5 microseconds."""
    return None if loss is None else loss.as_subclass(StepLoss)
