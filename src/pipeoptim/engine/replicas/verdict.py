"""All replicas of a stage leave out the same updates: bad is what one of them finds bad.

Each replica has losses of its own. The verdict of one travels back through its stages with the gradients, and on each stage to the
other replicas, beside their averages::

    replica 0    stage 0  <--gradients, verdict--  stage 1: the loss is nan
                    |  one number, as the gradients become their mean  |
    replica 1    stage 0  <--gradients-----------  stage 1: the loss is 2.1, and the update is left out
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class SharedVerdict:
    """Tells the verdicts of one stage to its replicas.

    Args:
        group: of these, on the CPU.
        timeout: to wait for them.
    """

    def __init__(self, group: dist.ProcessGroup, timeout: timedelta) -> None:
        self._group, self._timeout = group, timeout
        self._told: tuple[Any, Tensor] | None = None

    def tell(self, bad: bool) -> None:
        """That of this replica; does not wait."""
        verdict = torch.tensor([int(bad)])
        self._told = dist.all_reduce(verdict, dist.ReduceOp.MAX, group=self._group, async_op=True), verdict

    def hear(self) -> bool:
        """Whether the mini-batch is bad on any."""
        assert self._told is not None
        work, verdict = self._told
        self._told = None
        work.wait(self._timeout)
        return bool(verdict.item())

    def abandon(self) -> None:
        """Forget what was told."""
        self._told = None


__all__ = ["SharedVerdict"]
