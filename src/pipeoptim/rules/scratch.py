"""For optimizers without a rule's dry step: their own step, on copies of one weight and its state."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from pipeoptim.rules.move import State


@torch.no_grad()
def scratch_step(
    optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor, weight: Tensor, state: State, grad: Tensor
) -> Tensor:
    """The weight after the optimizer's next step, if its gradient is `grad`; nothing of the optimizer changes.

    Scratch memory: a copy of this weight and of its state. The step sees this parameter only, so an optimizer that couples its
    parameters (by a norm over all of them, say) is stepped as if it had no other.

    Args:
        optimizer, group: what steps it.
        parameter: as the optimizer knows it.
        weight, state, grad: what is stepped: of the parameter, or of the shard of it that this process holds.
    """
    own = torch.nn.Parameter(weight.detach().clone())
    own.grad = grad.detach().clone()
    # A deepcopy memo. The other parameters stand for themselves, so that none of them is copied.
    known: dict[int, Any] = {id(p): p for one in optimizer.param_groups for p in one["params"]}
    twin = object.__new__(type(optimizer))
    known |= {id(parameter): own, id(optimizer): twin}
    for name, value in vars(optimizer).items():
        if name.endswith("_hooks") and isinstance(value, dict):
            twin.__dict__[name] = OrderedDict()
        elif name not in ("state", "param_groups"):
            twin.__dict__[name] = copy.deepcopy(value, known)
    twin.state = defaultdict(dict)
    if parameter in optimizer.state:
        twin.state[own] = copy.deepcopy(state, known)
    options = {name: copy.deepcopy(value, known) for name, value in group.items() if name != "params"}
    twin.param_groups = [{**options, "params": [own]}]
    devices = [weight.device] if weight.is_cuda else []
    with torch.random.fork_rng(devices=devices):  # the step of some optimizers draws random numbers
        unhooked_step(type(optimizer))(twin)
    return own.detach()


_POSSIBLE: WeakKeyDictionary[Optimizer, bool] = WeakKeyDictionary()


def can_scratch_step(optimizer: Optimizer) -> bool:
    """Whether `scratch_step` works for this optimizer: it is tried once, and a warning says if it does not."""
    if optimizer not in _POSSIBLE:
        _POSSIBLE[optimizer] = _try(optimizer)
    return _POSSIBLE[optimizer]


def _try(optimizer: Optimizer) -> bool:
    for group in optimizer.param_groups:
        for weight in group["params"]:
            try:
                scratch_step(optimizer, group, weight, weight, optimizer.state.get(weight, {}), torch.zeros_like(weight))
            except Exception as reason:  # third-party code may raise anything
                warnings.warn(
                    f"{type(optimizer).__name__} has no prediction rule, and cannot be stepped on a copy of one weight ({reason!r}): "
                    'its last displacement is used instead of prediction "in_progress"; register_rule for it, or choose '
                    'prediction="displacement" to not be told',
                    stacklevel=2,
                )
                return False
            return True
    return True


def unhooked_step(cls: type[Any]) -> Any:
    """`step` of the class without the layer in which torch runs hooks, global ones included.

    Not ``optimizer.step``: a scheduler puts a function there that is bound to the original.
    """
    step = cls.step
    return step.__wrapped__ if getattr(step, "hooked", False) else step
