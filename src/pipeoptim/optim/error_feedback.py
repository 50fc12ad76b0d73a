"""Error feedback on updates: each step undoes what the step before has extrapolated too far, and extrapolates anew.

::

    y(t) ------ u(t) ------> y(t+1) ----- u(t+1) -----> y(t+2)      the plain run, which is not stored
     |                        |                          |
     s u(t-1) further on      s u(t)                     s u(t+1)
     v                        v                          v
    x(t)                     x(t+1)                     x(t+2)      the weights, where gradients are taken
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeoptim.optim.delay_compensation import DelayCompensation, moving

_EXTRAPOLATED = "extrapolated"


class ErrorFeedback(DelayCompensation):
    """``x(t+1) = x(t) - u(t) - (s u(t) - s u(t-1))``: the update, less what was extrapolated, plus a new extrapolation by s updates.

    u(t) is what the wrapped optimizer subtracts, learning rate and decay included, s the ``gap``; with s = 1, a delay of one update as in
    ``pipedream_2bw``, this is ``x - 2 u(t) + u(t-1)``. With ``y(t) = x(t) + s u(t-1)`` it reads ``y(t+1) = y(t) - u(t)``: the plain run y,
    whose gradients are taken at x, s displacements further on, where y will be when they are applied. If s changes between two updates,
    what was extrapolated with the old one is undone exactly.

    It costs one copy of the weights, kept in the optimizer's state, and a second one while it steps. It compensates the delay by itself,
    so weights are not predicted as well.

    Args:
        optimizer: any, that steps without a closure.
        gap: s, in updates; 0 leaves the optimizer as it is. "auto": a pipeline sets that of the stage, the mean over its micro-batches.

    Raises:
        ConfigError: what cannot be wrapped, or a gap that is no number of at least 0.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.zeros(1)); w.grad = torch.ones(1)
        >>> optimizer = ErrorFeedback(torch.optim.SGD([w], lr=1.0), gap=1)
        >>> for _ in range(3):
        ...     optimizer.step()
        ...     print(w.item())
        -2.0
        -3.0
        -4.0

    Source: Zmushko et al., arXiv 2606.30634, for a delay of one update; the form for s updates is this project's, from the same
    argument.
    """

    def corrected_step(self, gap: float) -> None:
        """See the class."""
        params = [p for group in self.param_groups for p in moving(group)]
        before = self._extrapolated(params)
        if gap == 0 and not before:  # exactly the wrapped optimizer, at its speed
            self.optimizer.step()
            return
        # The weights before the step; in place they become the update, and then what is extrapolated by it.
        ahead = [p.detach().clone() for p in params]
        self.optimizer.step()
        if params:
            torch._foreach_sub_(ahead, params)
            torch._foreach_mul_(ahead, gap)
            torch._foreach_sub_(params, ahead)
        if before:
            torch._foreach_add_(list(before), list(before.values()))
        for p, extrapolated in zip(params, ahead, strict=True):
            # After the step: an optimizer makes its own state where it finds none at all.
            if gap:
                self.state[p][_EXTRAPOLATED] = extrapolated
            else:
                self.state[p].pop(_EXTRAPOLATED, None)

    def _extrapolated(self, params: list[Tensor]) -> dict[Tensor, Any]:
        known: dict[Tensor, Any] = self.state
        return {p: known[p][_EXTRAPOLATED] for p in params if p in known and _EXTRAPOLATED in known[p]}
