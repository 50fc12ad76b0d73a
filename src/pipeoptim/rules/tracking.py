"""Keeps W_{t-1} of an optimizer, for predictions by displacement outside of an engine."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from pipeoptim.errors import ConfigError
from pipeoptim.rules.entries import optimizer_parameters


class Tracker:
    """Holds the weights as they were before the last step of one optimizer; made by `track`.

    Costs one copy of the weights and one pass over them per step. Ends with `remove()`, or as a context
    manager.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._previous: dict[Tensor, Tensor] = {}
        self._handle = optimizer.register_step_pre_hook(self._before_step)

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for weight in optimizer_parameters(optimizer):
            if weight in self._previous:
                self._previous[weight].copy_(weight)
            else:
                self._previous[weight] = weight.detach().clone()

    def previous(self, weights: list[Tensor]) -> list[Tensor] | None:
        """W_{t-1} of these parameters; None before the first step. A parameter added since then has not moved."""
        if not self._previous:
            return None
        return [self._previous.get(weight, weight.detach()) for weight in weights]

    def remove(self) -> None:
        """Stop tracking and free the copy."""
        self._handle.remove()
        self._previous.clear()
        for optimizer, tracker in list(_TRACKERS.items()):
            if tracker is self:
                del _TRACKERS[optimizer]

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


_TRACKERS: WeakKeyDictionary[Optimizer, Tracker] = WeakKeyDictionary()


def track(optimizer: Optimizer) -> Tracker:
    """Remember the weights before each step, so that `predict_weights` can use ``W_t - W_{t-1}``.

    Needed only for kind="displacement" and for optimizers without a rule. Tracking twice returns the same
    handle.

    Raises:
        ConfigError: no optimizer.

    Example:
        >>> import torch
        >>> from pipeoptim.rules import predict_weights
        >>> w = torch.nn.Parameter(torch.ones(1)); w.grad = torch.ones(1)
        >>> opt = torch.optim.SGD([w], lr=0.25)
        >>> with track(opt):
        ...     opt.step()
        ...     predict_weights(opt, 2, kind="displacement")
        [tensor([0.2500])]
    """
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(f"track() was given {optimizer!r}, must be given a torch.optim.Optimizer, whose steps it follows")
    if optimizer not in _TRACKERS:
        _TRACKERS[optimizer] = Tracker(optimizer)
    return _TRACKERS[optimizer]


def tracked_previous(optimizer: Optimizer) -> list[Tensor] | None:
    """W_{t-1} in param_groups order if this optimizer is tracked and has stepped."""
    tracker = _TRACKERS.get(optimizer)
    return tracker.previous(optimizer_parameters(optimizer)) if tracker is not None else None
