"""For optimizers without a rule: one step of a copy, which changes nothing of the original."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pipeoptim.kernels import calls
from pipeoptim.kernels.library import available
from pipeoptim.kernels.tensor_layout import share_flat_index
from pipeoptim.rules.entries import optimizer_parameters
from pipeoptim.rules.scratch import unhooked_step


@torch.no_grad()
def next_weights_of_copy(optimizer: Optimizer) -> list[Tensor] | None:
    """The weights after one more step with the present gradients, found by stepping a copy of the optimizer and its weights.

    None if there is no gradient, or if the copy cannot be made or stepped (said in a warning). The
    optimizer, its state, its parameters, hooks and torch's random numbers stay as they are.
    """
    if all(weight.grad is None for weight in optimizer_parameters(optimizer)):
        return None
    devices = {w.device for w in optimizer_parameters(optimizer) if w.device.type == "cuda"}
    try:
        twin, weights = copy_optimizer(optimizer)
        with torch.random.fork_rng(devices=list(devices)):  # the step of some optimizers draws random numbers
            unhooked_step(type(optimizer))(twin)
    except Exception as reason:  # third-party code may raise anything
        warnings.warn(
            f"{type(optimizer).__name__} has no prediction rule, and a copy of it could not take a step "
            f"({reason!r}): the weights are used unpredicted. Call pipeoptim.track(optimizer) before its "
            "last step, or register_rule for it.",
            stacklevel=6,
        )
        return None
    return weights


def copy_optimizer(optimizer: Optimizer) -> tuple[Any, list[Tensor]]:
    """A twin with its own parameters, gradients and state.

    Not copy.deepcopy: torch's optimizers copy only state and param groups, while third-party optimizers have
    attributes of their own. Hooks are left out.
    """
    known: dict[int, Any] = {}  # a deepcopy memo: whatever refers to an original parameter will refer to its copy
    weights: list[Tensor] = []
    for weight in optimizer_parameters(optimizer):
        own = torch.nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        own.grad = None if weight.grad is None else weight.grad.detach().clone()
        known[id(weight)] = own
        weights.append(own)
    twin = object.__new__(type(optimizer))
    known[id(optimizer)] = twin
    for name, value in vars(optimizer).items():
        if name.endswith("_hooks") and isinstance(value, dict):
            twin.__dict__[name] = OrderedDict()
        else:
            twin.__dict__[name] = copy.deepcopy(value, known)
    return twin, [weight.detach() for weight in weights]


@torch.no_grad()
def copy_weights(weights: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """For s = 0 and unknown displacements: the weights themselves, bit for bit."""
    pairs = list(zip(weights, out, strict=True))
    large = sum(weight.numel() for weight in weights) >= calls.STREAM_FROM
    if large and all(share_flat_index(pair) for pair in pairs) and available():
        calls.copy_tensors([weight for weight, _ in pairs], [buffer for _, buffer in pairs])
        return
    for weight, buffer in pairs:
        buffer.copy_(weight)
