"""Step and prediction in one pass over memory: what an engine calls in place of ``optimizer.step()`` where it can.

A separate prediction reads again what the step has just written. Done together, the prediction costs one more pass over
the weights: 8 in place of the 7 of Adam's step. Saved: AdamW of 97 million weights on one thread takes 1.11 times torch's fused step
instead of 1.74 (``pipeoptim bench predict``, docs/optimizers.md). The step is torch's formula, rounded in float32 like torch's own
kernels but not in the same order, so the two agree to a few units in the last place, not bit for bit.

Wherever torch's step would do anything else (hooks, a patched step, a GradScaler, an option that the kernel lacks, no state yet, another
type or device), nothing is done and False is returned. Then the caller runs ``optimizer.step()``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.profiler import record_function
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from pipeoptim.kernels.library import available
from pipeoptim.rules.combined import members
from pipeoptim.rules.entries import ParameterEntry
from pipeoptim.rules.fused.batch import stepper_of
from pipeoptim.rules.fused.ownership import exclusively_owned
from pipeoptim.rules.fused.plan import FusedPlan
from pipeoptim.rules.fused.plan_cache import PlanCache
from pipeoptim.rules.horizon import Horizon
from pipeoptim.rules.rule_moves import predict_by_rule

_NO_BUFFERS, _GRADIENTS = 0, -1  # keys of plans, where others have the id of their first buffer


class FusedStep:
    """Steps `optimizer` and predicts, mini-batch after mini-batch; keeps a plan of the tensors that kernels can take.

    Args:
        optimizer: the one, or the combined one.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._steppers = (optimizer, *(member for member in members(optimizer) if member is not optimizer))
        self._plans = PlanCache()
        self._asked_for: Sequence[ParameterEntry] | None = None  # the entries that `_possible` was found for
        self._possible = False

    def possible(self, entries: Sequence[ParameterEntry]) -> bool:
        """Whether there is a kernel for every parameter; hooks and states are looked at in each step."""
        # Asked before every update, so the answer is kept for as long as the entries are the same object.
        if entries is not self._asked_for:
            self._asked_for, self._possible = entries, _have_kernels(entries)
        return self._possible

    def __call__(
        self, entries: Sequence[ParameterEntry], horizon: Horizon | None = None, out: Sequence[Tensor] | None = None
    ) -> bool:
        """Step, and write the weights predicted after it into `out`. If that is impossible, do nothing and return False.

        Args:
            entries: the optimizer's parameters, from `parameter_entries`.
            horizon: what to predict from, beginning *after* this step.
            out: one buffer per parameter. Without `horizon` and `out` nothing is predicted.
        """
        if not self._unpatched():
            return False
        # An engine alternates between a few buffer sets; the first buffer identifies the set.
        plan, grads = self._current_plan(entries, out, _NO_BUFFERS if not out else id(out[0]))
        if plan is None:
            return False
        self._step_profiled(plan, grads, horizon)
        # The kernel visits only parameters that move, but every buffer must hold a prediction.
        if horizon is not None and out is not None and plan.without_grad:
            _predict_unmoved([entries[n] for n in plan.without_grad], horizon, [out[n] for n in plan.without_grad])
        return True

    def over_gradients(self, entries: Sequence[ParameterEntry], horizon: Horizon) -> list[Tensor] | None:
        """Step, and write the predicted weights over the gradients, which are returned. If impossible, do nothing and return None.

        It takes as many passes over memory as into buffers, but each line that was just read is the one written back. Saved: on one core,
        97 million weights, the kernel alone takes 1.10 instead of 1.19 times torch's fused step of SGD with momentum, 1.06 instead
        of 1.12 of Adam's (``pipeoptim bench predict``). Impossible where a parameter has no gradient, or one that
        anybody else refers to.
        """
        if not self._unpatched():
            return None
        plan, grads = self._current_plan(entries, None, _GRADIENTS)
        # The gradients replace the whole buffer set, so all of them must exist.
        if plan is None or plan.without_grad:
            return None
        found = [grad for grad in grads if grad is not None]
        grads.clear()  # `exclusively_owned` counts references, and this list would be one more
        if not exclusively_owned(found):
            return None
        self._step_profiled(plan, found, horizon)
        return found

    def _unpatched(self) -> bool:
        return all(map(unpatched, self._steppers))

    def _step_profiled(self, plan: FusedPlan, grads: Sequence[Tensor | None], horizon: Horizon | None) -> None:
        if not torch._C._autograd._profiler_enabled():
            self._step_batches(plan, grads, horizon)
            return
        # Under torch's profiler the step keeps the name under which users look for it.
        with record_function(f"Optimizer.step#{type(self.optimizer).__name__}.step_and_predict"):
            self._step_batches(plan, grads, horizon)

    def _step_batches(self, plan: FusedPlan, grads: Sequence[Tensor | None], horizon: Horizon | None) -> None:
        records_graph = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # as no_grad() does, in a sixth of its time
        try:
            for batch in plan.batches:
                batch.kernel.run(*batch.job(grads, horizon))
        finally:
            torch._C._set_grad_enabled(records_graph)
        for one in self._steppers:
            # Or the scheduler would warn that it steps before its optimizer.
            if hasattr(one.step, "_wrapped_by_lr_sched"):
                one._opt_called = True  # type: ignore[attr-defined]  # what a scheduler's wrapper of step() notes

    def _current_plan(
        self, entries: Sequence[ParameterEntry], out: Sequence[Tensor] | None, key: int
    ) -> tuple[FusedPlan | None, list[Tensor | None]]:
        """The plan for this set of buffers, rebuilt if anything has changed, and the gradients; None if no plan is possible."""
        self._plans.prefetch(key)  # while the gradients are looked up
        grads = [entry.weight.grad for entry in entries]
        plan = self._plans.current(key, entries, grads, out, over_gradients=key == _GRADIENTS)
        # Asked last: RAdam's first steps are torch's, while the plan itself stays good.
        return (plan if plan is not None and plan.supports_next_step() else None), grads


def _have_kernels(entries: Sequence[ParameterEntry]) -> bool:
    if not entries or not all(stepper_of(e.rule) is not None and e.weight.dtype is torch.float32 for e in entries):
        return False
    return all(e.weight.device.type == "cpu" for e in entries) and available()


@torch.no_grad()
def _predict_unmoved(entries: Sequence[ParameterEntry], horizon: Horizon, out: Sequence[Tensor]) -> None:
    """Parameters without a gradient: the step skips them, their prediction follows from their state."""
    for entry, buffer in zip(entries, out, strict=True):
        if entry.kind == "displacement":
            # Without a gradient torch's step skips it: its last displacement is 0.
            buffer.copy_(entry.weight)
    predict_by_rule(entries, [None] * len(entries), horizon, out)


def unpatched(optimizer: Optimizer) -> bool:
    """Whether ``optimizer.step()`` is that of its class, without a GradScaler and without hooks, but for those that only check."""
    step = vars(optimizer).get("step")  # a scheduler puts a wrapper here that notes the call
    if step is not None and not (hasattr(step, "_wrapped_by_lr_sched") and step.__wrapped__ is type(optimizer).step):
        return False
    if not all(getattr(hook, "only_checks", False) for hook in optimizer._optimizer_step_pre_hooks.values()):
        return False
    hooks = (
        optimizer._optimizer_step_post_hooks,
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    )
    # GradScaler sets these on torch's fused optimizers, whose step then unscales by itself.
    scaled = getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None
    return not any(hooks) and not scaled
