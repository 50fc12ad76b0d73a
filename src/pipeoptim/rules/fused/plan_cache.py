"""The plans of the few sets of buffers that an engine alternates between."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pipeoptim.rules.entries import ParameterEntry
from pipeoptim.rules.fused.plan import FusedPlan, make_plan

MAX_PLANS = 4
"""Plans that are kept, one per set of buffers: an engine has few sets, and takes them in turn."""


class PlanCache:
    """A plan for each set of buffers, made anew when anything has changed that it rests on."""

    def __init__(self) -> None:
        self._plans: dict[int, FusedPlan] = {}

    def prefetch(self, key: int) -> None:
        """Ask for the memory of the plan of `key`, if there is one, before it is checked."""
        if (plan := self._plans.get(key)) is not None:
            plan.prefetch()

    def current(
        self,
        key: int,
        entries: Sequence[ParameterEntry],
        grads: Sequence[Tensor | None],
        out: Sequence[Tensor] | None,
        *,
        over_gradients: bool = False,
    ) -> FusedPlan | None:
        """The plan of `key` for these tensors; None if none is possible."""
        plan = self._plans.get(key)
        if plan is None or not plan.still_fits(entries, grads, out):
            plan = make_plan(entries, grads, out, over_gradients=over_gradients)
            # Emptied as a whole: a plan holds its tensors alive, and stale ones are of no use.
            if len(self._plans) >= MAX_PLANS or plan is None:
                self._plans.clear()
            if plan is not None:
                self._plans[key] = plan
        return plan
