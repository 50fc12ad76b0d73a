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

import torch
from torch import Tensor
from torch.autograd.profiler import record_function
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from pipeoptim.kernels import calls
from pipeoptim.kernels.library import available
from pipeoptim.rules.combined import members
from pipeoptim.rules.entries import ParameterEntry, predict_by_rule, rates_for
from pipeoptim.rules.fused.ownership import alone
from pipeoptim.rules.fused.plan import Family, FusedPlan, make_plan, stepper_of
from pipeoptim.rules.fused.steppers import Stepper
from pipeoptim.rules.move import Ahead, Scalar

SETS = 4
"""Sets of buffers whose plans are kept: an engine has few, and takes them in turn."""


class FusedStep:
    """Steps `optimizer` and predicts, mini-batch after mini-batch; remembers which tensors were found fit for a kernel.

    Args:
        optimizer: the one, or the combined one.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._plans: dict[int, FusedPlan] = {}  # id of the first buffer, 0 for none, -1 for the gradients' own memory -> plan

    @torch.no_grad()
    def __call__(
        self,
        parts: Sequence[ParameterEntry],
        rates: Sequence[tuple[Scalar, ...]] | None = None,
        out: Sequence[Tensor] | None = None,
    ) -> bool:
        """Step, and write the weights predicted after it into `out`; False, and nothing done, if that cannot be.

        Args:
            parts: the optimizer's parameters, from `parameter_entries`.
            rates: for each param group the learning rates of the updates *after* this step.
            out: one buffer per parameter. Without `rates` and `out` nothing is predicted.
        """
        if not self._unpatched():
            return False
        plan, grads = self._plan(parts, out)
        if plan is None:
            return False
        self._run(plan, grads, rates)
        if rates is not None and out is not None and plan.still:
            _predict_others([(parts[n], out[n]) for n in plan.still], rates)
        return True

    @torch.no_grad()
    def over_gradients(self, parts: Sequence[ParameterEntry], rates: Sequence[tuple[Scalar, ...]]) -> list[Tensor] | None:
        """Step, and write the predicted weights over the gradients: those, for every parameter; None, and nothing done, if not.

        Cannot be where a parameter has no gradient, or one that somebody else has as well.
        """
        if not self._unpatched():
            return None
        plan, grads = self._plan(parts, None, over_gradients=True)
        if plan is None or plan.still:
            return None
        found = [grad for grad in grads if grad is not None]
        grads.clear()
        if not alone(found):
            return None
        self._run(plan, found, rates)
        return found

    def _unpatched(self) -> bool:
        return all(map(_unpatched, {self.optimizer, *members(self.optimizer)}))

    def _run(self, plan: FusedPlan, grads: Sequence[Tensor | None], rates: Sequence[tuple[Scalar, ...]] | None) -> None:
        name = f"Optimizer.step#{type(self.optimizer).__name__}.step_and_predict"
        with record_function(name) if torch._C._autograd._profiler_enabled() else nullcontext():
            for family in plan.families:
                _run(family, [grads[n] for n in family.numbers], rates)
        for one in {self.optimizer, *members(self.optimizer)}:
            if hasattr(one.step, "_wrapped_by_lr_sched"):
                one._opt_called = True  # type: ignore[attr-defined]  # what a scheduler's wrapper of step() notes

    def _plan(
        self, parts: Sequence[ParameterEntry], out: Sequence[Tensor] | None, over_gradients: bool = False
    ) -> tuple[FusedPlan | None, list[Tensor | None]]:
        """That of this set of buffers, made anew if anything is not as it was, and the gradients; None if there can be none."""
        key = id(out[0]) if out else -int(over_gradients)
        plan = self._plans.get(key)
        if plan is not None:
            plan.fetch()
        grads = [item.weight.grad for item in parts]
        if plan is None or not plan.holds(parts, grads, out):
            plan = make_plan(parts, grads, out, over_gradients)
            if len(self._plans) >= SETS or plan is None:
                self._plans.clear()
            if plan is not None:
                self._plans[key] = plan
        return (plan if plan is not None and plan.ready() else None), grads


def _run(family: Family, grads: Sequence[Tensor | None], rates: Sequence[tuple[Scalar, ...]] | None) -> None:
    """One step of all parameters of a family, all of which have a gradient."""
    which, firsts = family.recipes(family.counts.add(1.0))
    hows = []  # parameters of one group that are at the same step share all numbers
    for first, t in firsts:
        item, grad = family.parts[first], grads[first]
        assert grad is not None
        ahead = None if rates is None else _ahead(item, family.stepper, grad, rates[item.group_number])
        hows.append(family.stepper.how(item.group, t, ahead))
    family.steps.run([grad.data_ptr() for grad in grads if grad is not None], which, hows)


def could_fuse(parts: Sequence[ParameterEntry]) -> bool:
    """Whether `FusedStep` has a kernel for every parameter; hooks and states are looked at in each step."""
    if not parts or not all(stepper_of(i.rule) is not None and i.weight.dtype is torch.float32 for i in parts):
        return False
    return all(i.weight.device.type == "cpu" for i in parts) and available()


def _ahead(item: ParameterEntry, stepper: Stepper, grad: Tensor, rates: tuple[Scalar, ...]) -> calls.KernelPrediction:
    """What to predict after the step of this parameter, and of all that share its group and its step count."""
    if item.kind == "none":
        return calls.KernelPrediction()
    if item.kind == "displacement":
        return calls.KernelPrediction(steps=float(len(rates)))
    assert item.rule is not None
    state = item.state
    move = item.rule.move(item.weight, state, grad, item.group, Ahead(item.kind, rates_for(item.kind, rates)))
    if move is None:
        return calls.KernelPrediction()
    assert not isinstance(move.keep, Tensor)
    return calls.KernelPrediction(1.0 - move.keep, stepper.factors(move, grad, state))


def _predict_others(still: Sequence[tuple[ParameterEntry, Tensor]], rates: Sequence[tuple[Scalar, ...]]) -> None:
    """Parameters without a gradient: the step leaves them alone, the prediction goes by what their state says."""
    for item, buffer in still:
        if item.kind == "displacement":
            buffer.copy_(item.weight)
    predict_by_rule([i for i, _ in still], [None] * len(still), rates, [b for _, b in still])


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
