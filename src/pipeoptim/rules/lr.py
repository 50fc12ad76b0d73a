"""The learning rates of the next s updates: a copy of the scheduler steps forward, the original is not touched.

The copy is shallow: schedulers hold numbers and a reference to their optimizer, which is replaced by a stand-in that has only param
groups. So it costs microseconds at any model size, and no optimizer state is copied.
"""

from __future__ import annotations

import operator
import types
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pipeoptim.errors import ConfigError
from pipeoptim.rules.move import Scalar, scalar


def next_rates(optimizer: Optimizer, scheduler: LRScheduler | None, steps: int, *, after: int = 0) -> list[tuple[Scalar, ...]]:
    """For each param group the learning rates of the next `steps` updates: lr_1 (the present one), lr_2, ... lr_s.

    With `after`, those of the updates that come after that many others.

    Without a scheduler, and with ReduceLROnPlateau (which needs losses that are not known yet), the present
    rate is repeated. Past the end of a finite schedule (OneCycleLR raises there) the last rate is repeated.

    Example:
        >>> import torch
        >>> opt = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> next_rates(opt, torch.optim.lr_scheduler.ExponentialLR(opt, 0.5), 3)
        [(1.0, 0.5, 0.25)]
    """
    if scheduler is not None and not drives(scheduler, optimizer):
        raise ConfigError(f"{type(scheduler).__name__} drives another optimizer: pass the scheduler made for this one")
    present = [scalar(group["lr"]) for group in optimizer.param_groups]
    if scheduler is None or steps + after <= 1 or isinstance(scheduler, ReduceLROnPlateau):
        return [(lr,) * steps for lr in present]
    return [rates[after:] for rates in _rates_of_twin(optimizer, scheduler, steps + after)]


def drives(scheduler: Any, optimizer: Optimizer) -> bool:
    """Whether the scheduler sets the rates of this optimizer: it is made for it, or for one with the same groups (a wrapper)."""
    other = getattr(scheduler, "optimizer", None)
    if other is optimizer:
        return True
    theirs = getattr(other, "param_groups", ())
    return len(theirs) == len(optimizer.param_groups) and all(map(operator.is_, theirs, optimizer.param_groups))


def _rates_of_twin(optimizer: Optimizer, scheduler: LRScheduler, steps: int) -> list[tuple[Scalar, ...]]:
    stand_in = _StandIn(optimizer)
    twin = _scheduler_twin(scheduler, stand_in)
    seen = [stand_in.rates()]
    for _ in range(steps - 1):
        # Stepped rather than computed from get_lr(): chainable and sequential schedulers have no closed form.
        try:
            twin.step()
        except Exception:  # a schedule may end (each says so in its own way): hold its last rate
            seen.append(seen[-1])
        else:
            seen.append(stand_in.rates())
    return [tuple(rates) for rates in zip(*seen, strict=True)]


class _StandIn:
    """What a scheduler sees of its optimizer: param groups of its own, and marks that silence order warnings."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.param_groups = [{name: _own_copy(value) for name, value in group.items()} for group in optimizer.param_groups]
        self.defaults = optimizer.defaults
        self._opt_called = True

    def rates(self) -> list[Scalar]:
        """Learning rate of each group, by value."""
        rates = [scalar(group["lr"]) for group in self.param_groups]
        return [lr.clone() if isinstance(lr, Tensor) else lr for lr in rates]

    def step(self) -> None:
        """Never called; its attribute silences the scheduler's warning about the order of calls."""

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]


def _own_copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _scheduler_twin(scheduler: Any, stand_in: _StandIn) -> Any:
    """A copy of a scheduler (and of schedulers inside it) that drives `stand_in`."""
    known: dict[int, Any] = {id(scheduler.optimizer): stand_in}

    def separate(value: Any) -> Any:
        if id(value) in known:
            return known[id(value)]
        if isinstance(value, LRScheduler):
            return copied(value)
        if isinstance(value, types.MethodType) and id(value.__self__) in known:
            return types.MethodType(value.__func__, known[id(value.__self__)])
        if type(value) in (list, tuple):
            return type(value)(separate(item) for item in value)
        if isinstance(value, dict):
            own = value.copy()  # keeps the class, a Counter or an OrderedDict say
            for key, item in value.items():  # not update(): a Counter (MultiStepLR's milestones) would add
                own[key] = separate(item)
            return own
        return _own_copy(_shallow(value) if callable(value) else value)

    def copied(original: Any) -> Any:
        twin = known[id(original)] = object.__new__(type(original))
        twin.__dict__.update({name: separate(value) for name, value in vars(original).items()})
        return twin

    return copied(scheduler)


def _shallow(function: Any) -> Any:
    """A callable object may count its calls: the twin gets its own counter, while what the object refers to is shared."""
    if isinstance(function, (types.FunctionType, types.MethodType, type)) or type(function).__module__ in _STATELESS:
        return function
    try:
        own = object.__new__(type(function))
        own.__dict__.update(vars(function))
    except (TypeError, AttributeError):  # written in C, or with slots
        return function
    return own


_STATELESS = ("builtins", "functools")
