"""How the stages that hold a tied weight tell each other its gradients: through memory in the emulator, all-reduced in processes."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeoptim.engine.processes.exchange import LocalExchangeEnd, Sums
from pipeoptim.engine.processes.rendezvous import Rendezvous
from pipeoptim.errors import StageFailure


class LocalGradientSum:
    """The exchange between stages of one process. Stage ``k`` uses ``board.end(k)``."""

    def __init__(self, holders: Sequence[int]) -> None:
        self.holders = tuple(holders)
        self._gradients: dict[int, dict[int, Tensor]] = {}
        self._sums: dict[int, list[Tensor]] = {}  # version -> one per holder that has not taken it

    def end(self, k: int) -> Sums:
        """What stage ``k`` holds."""
        return LocalExchangeEnd(self, k)

    def send(self, k: int, version: int, gradient: Tensor) -> None:
        """Note the gradient of stage ``k``."""
        told = self._gradients.setdefault(version, {})
        told[k] = gradient
        if len(told) == len(self.holders):
            found = in_order([told[j] for j in self.holders])
            self._sums[version] = [found, *(found.clone() for _ in self.holders[1:])]
            del self._gradients[version]

    def can_receive(self, version: int) -> bool:
        """Whether all holders have noted theirs."""
        return version in self._sums

    def receive(self, version: int) -> Tensor:
        """The sum; forgotten when every holder has taken it."""
        assert self.can_receive(version), f"the gradients of version {version} are not complete"
        found = self._sums[version].pop()
        if not self._sums[version]:
            del self._sums[version]
        return found

    def abandon(self) -> None:
        """Forget all gradients and sums."""
        self._gradients.clear()
        self._sums.clear()


class AllReducedGradients:
    """The exchange between processes, started at once and waited for late.

    Two holders all-reduce, whose sum does not depend on its order; more of them gather the gradients and add them up in the order
    of the stages, as the emulator does.

    Args:
        timeout: seconds to wait for the others.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timedelta(seconds=timeout)
        self._holders: Rendezvous | None = None
        self._works: dict[int, tuple[Any, list[Tensor]]] = {}
        self._told: dict[int, Tensor] = {}

    def connect(self, holders: Rendezvous) -> None:
        """Use a group of ``holders`` for this alone: it waits for no activation, and no activation waits for it."""
        self._holders = holders

    @property
    def group(self) -> dist.ProcessGroup:
        """That group."""
        assert self._holders is not None
        return self._holders.group("sums")

    def receive_pending(self) -> None:
        """Wait for what has been sent; it can be taken later."""
        self._told |= {version: self.receive(version) for version in list(self._works)}

    def abandon(self) -> None:
        self._works.clear()
        self._told.clear()

    def interrupt(self) -> None:
        """End a wait of this process for the other holders, from another thread, and all later ones."""
        if self._holders is not None:
            self._holders.interrupt()

    def close(self, wait: bool) -> None:
        """Give the group back."""
        self._works.clear()
        if self._holders is not None:
            self._holders.close(wait)

    def send(self, version: int, gradient: Tensor) -> None:
        count = self.group.size()
        try:
            if count == 2:
                every = [gradient]
                work = dist.all_reduce(gradient, group=self.group, async_op=True)
            else:
                every = [torch.empty_like(gradient) for _ in range(count)]
                work = dist.all_gather(every, gradient, group=self.group, async_op=True)
        except RuntimeError as error:
            raise _failure(error) from error
        self._works[version] = work, every

    def can_receive(self, version: int) -> bool:
        return True

    def receive(self, version: int) -> Tensor:
        if version in self._told:
            return self._told.pop(version)
        work, every = self._works.pop(version)
        try:
            work.wait(self.timeout)
        except RuntimeError as error:
            raise _failure(error) from error
        return in_order(every)


def in_order(gradients: Sequence[Tensor]) -> Tensor:
    """Their sum from the first to the last, in the first one's memory, so that all engines get the same bits."""
    found, *others = gradients
    for other in others:
        found.add_(other)
    return found


def _failure(error: RuntimeError) -> StageFailure:
    first = (str(error).splitlines() or ["no reason given"])[0][:160]
    return StageFailure(f"a stage died or did not tell its gradient of a tied weight ({first})")
