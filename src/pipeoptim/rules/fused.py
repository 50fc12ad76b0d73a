"""Step and prediction in one pass over memory: what an engine calls in place of ``optimizer.step()`` where it can.

A separate prediction reads again what the step has just written. Done together, the prediction costs one more pass over
the weights: 8 in place of the 7 of Adam's step. The step is torch's formula, rounded in float32 like torch's own kernels
but not in the same order, so the two agree to a few units in the last place, not bit for bit.

Nothing is done, and False returned, wherever torch's step would do anything else: hooks, a patched step, a GradScaler, an
option that the kernel lacks, no state yet, another type or device. Then the caller runs ``optimizer.step()``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.profiler import record_function
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from pipeoptim.kernels import calls
from pipeoptim.kernels.library import available
from pipeoptim.kernels.memory import flat
from pipeoptim.rules.combined import members
from pipeoptim.rules.drive import Item, rates_for, write_by_rule
from pipeoptim.rules.move import Ahead, Scalar, State
from pipeoptim.rules.registry import Rule
from pipeoptim.rules.steps import Stepper


class FusedStep:
    """Steps `optimizer` and predicts, mini-batch after mini-batch; remembers which tensors were found fit for a kernel.

    Args:
        optimizer: the one, or the combined one.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._fit: dict[int, _Fit] = {}  # id of a buffer -> with what it was found fit

    @torch.no_grad()
    def __call__(
        self,
        parts: Sequence[Item],
        rates: Sequence[tuple[Scalar, ...]] | None = None,
        out: Sequence[Tensor] | None = None,
    ) -> bool:
        """Step, and write the weights predicted after it into `out`; False, and nothing done, if that cannot be.

        Args:
            parts: the optimizer's parameters, from `items`.
            rates: for each param group the learning rates of the updates *after* this step.
            out: one buffer per parameter. Without `rates` and `out` nothing is predicted.
        """
        buffers: Sequence[Tensor | None] = [None] * len(parts) if out is None else out
        moving = []
        for item, buffer in zip(parts, buffers, strict=True):
            if (grad := item.weight.grad) is not None:
                moving.append(_Moving(item, _stepper(item.rule), grad, item.state, buffer))
        stepped = {self.optimizer, *members(self.optimizer)}
        if not moving or not all(map(_unpatched, stepped)) or not self._covered(moving):
            return False
        name = f"Optimizer.step#{type(self.optimizer).__name__}.step_and_predict"
        with record_function(name) if torch._C._autograd._profiler_enabled() else nullcontext():
            _run(moving, rates)
            if rates is not None and out is not None and len(moving) < len(parts):
                _predict_others(parts, rates, out)
        for one in stepped:
            if hasattr(one.step, "_wrapped_by_lr_sched"):
                one._opt_called = True  # type: ignore[attr-defined]  # what a scheduler's wrapper of step() notes
        return True

    def _covered(self, moving: Sequence[_Moving]) -> bool:
        """Whether there is a kernel for every option and every tensor."""
        covered: dict[int, bool] = {}
        for item, stepper, grad, state, buffer in moving:
            if stepper is None:
                return False
            if item.group_number not in covered:
                covered[item.group_number] = stepper.covers(item.group)
            states = stepper.state_tensors(state, item.group) if covered[item.group_number] else None
            if states is None or not self._are_fit(item.weight, grad, buffer, states):
                return False
        return available()

    def _are_fit(self, weight: Tensor, grad: Tensor, buffer: Tensor | None, states: Sequence[Tensor]) -> bool:
        """As ``flat`` of all of them; of those that were fit before, only what can have changed is looked at."""
        if buffer is None:
            buffer = weight
        known = self._fit.get(id(buffer))
        if known is None or not known.is_of(weight, buffer, states):
            if not flat([weight, grad, buffer, *states]):
                return False
            if len(self._fit) > 4 * len(self.optimizer.state) + 64:  # buffers come from few sets, used again and again
                self._fit.clear()
            self._fit[id(buffer)] = _Fit(buffer, weight.data_ptr(), weight.shape, tuple(states))
            return True
        return flat((weight, grad))


class _Fit(NamedTuple):
    """A buffer, and the weight and states that lie in memory as it does."""

    buffer: Tensor
    address: int
    shape: torch.Size
    states: tuple[Tensor, ...]

    def is_of(self, weight: Tensor, buffer: Tensor, states: Sequence[Tensor]) -> bool:
        """Whether these are still the same."""
        same = buffer is self.buffer and weight.data_ptr() == self.address and weight.shape == self.shape
        return same and len(states) == len(self.states) and all(map(is_, states, self.states))


def _run(moving: Sequence[_Moving], rates: Sequence[tuple[Scalar, ...]] | None) -> None:
    counts = [part.state["step"] for part in moving if "step" in part.state]
    if counts:
        torch._foreach_add_(counts, _ONE)
    jobs: dict[Stepper, list[Any]] = {}
    recipes: dict[tuple[int, float], Any] = {}  # parameters of one group that are at the same step share all numbers
    for part in moving:
        item, stepper, grad, state, buffer = part
        assert stepper is not None
        key = item.group_number, state["step"].item() if "step" in state else 1.0
        if key not in recipes:
            ahead = None if rates is None else _ahead(part, stepper, rates[item.group_number])
            recipes[key] = stepper.how(item.group, key[1], ahead)
        jobs.setdefault(stepper, []).append(stepper.job(recipes[key], item.weight, grad, state, buffer))
    for stepper, theirs in jobs.items():
        stepper.run(theirs)


def could_fuse(parts: Sequence[Item]) -> bool:
    """Whether `FusedStep` has a kernel for every parameter; hooks and states are looked at in each step."""
    if not parts or not all(_stepper(i.rule) is not None and i.weight.dtype is torch.float32 for i in parts):
        return False
    return all(i.weight.device.type == "cpu" for i in parts) and available()


_ONE = torch.ones(())
"""A number would be made into a tensor anew for each count."""


class _Moving(NamedTuple):
    """A parameter with a gradient."""

    item: Item
    stepper: Stepper | None
    grad: Tensor
    state: State
    buffer: Tensor | None


def _ahead(part: _Moving, stepper: Stepper, rates: tuple[Scalar, ...]) -> calls.Ahead:
    """What to predict after the step of this parameter, and of all that share its group and its step count."""
    item, grad, state = part.item, part.grad, part.state
    if item.kind == "none":
        return calls.Ahead()
    if item.kind == "displacement":
        return calls.Ahead(steps=float(len(rates)))
    assert item.rule is not None
    move = item.rule.move(item.weight, state, grad, item.group, Ahead(item.kind, rates_for(item.kind, rates)))
    if move is None:
        return calls.Ahead()
    assert not isinstance(move.keep, Tensor)
    return calls.Ahead(1.0 - move.keep, stepper.factors(move, grad, state))


def _predict_others(parts: Sequence[Item], rates: Sequence[tuple[Scalar, ...]], out: Sequence[Tensor]) -> None:
    """Parameters without a gradient: the step leaves them alone, the prediction goes by what their state says."""
    still = [(item, buffer) for item, buffer in zip(parts, out, strict=True) if item.weight.grad is None]
    for item, buffer in still:
        if item.kind == "displacement":
            buffer.copy_(item.weight)
    write_by_rule([i for i, _ in still], [None] * len(still), rates, [b for _, b in still])


def _stepper(rule: Rule | None) -> Stepper | None:
    """Of the rule's own class only: a subclass may predict something that the kernel does not know."""
    return vars(type(rule)).get("stepper") if rule is not None else None


def _unpatched(optimizer: Optimizer) -> bool:
    """Whether ``optimizer.step()`` is what its class says, and nobody listens to it."""
    step = vars(optimizer).get("step")  # a scheduler puts a wrapper here that notes the call
    if step is not None and not (hasattr(step, "_wrapped_by_lr_sched") and step.__wrapped__ is type(optimizer).step):
        return False
    hooks = (
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    )
    scaled = getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None
    return not any(hooks) and not scaled
