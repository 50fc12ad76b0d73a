"""How the gradients of a tied weight are summed over the stages that hold it: in memory in one process, all-reduced between processes."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeoptim.engine.processes.exchange import GradientExchange, LocalExchangeEnd
from pipeoptim.engine.processes.rendezvous import Rendezvous
from pipeoptim.errors import StageFailure, first_line


class LocalGradientSum:
    """The exchange between stages of one process. Stage ``k`` uses ``exchange.end(k)``."""

    def __init__(self, holders: Sequence[int]) -> None:
        self.holders = tuple(holders)
        self._gradients: dict[int, dict[int, Tensor]] = {}
        self._sums: dict[int, list[Tensor]] = {}  # version -> one per holder that has not taken it

    def end(self, k: int) -> GradientExchange:
        """The end of stage ``k``."""
        return LocalExchangeEnd(self, k)

    def send(self, k: int, version: int, gradient: Tensor) -> None:
        """Store the gradient of stage ``k``; the last one completes the sum."""
        gradients = self._gradients.setdefault(version, {})
        gradients[k] = gradient
        if len(gradients) == len(self.holders):
            # In the order of the stages, not of arrival: which stage comes last depends on the emulator's turns.
            found = in_order([gradients[j] for j in self.holders])
            # A copy for each: clipping scales the gradient in place.
            self._sums[version] = [found, *(found.clone() for _ in self.holders[1:])]
            del self._gradients[version]

    def can_receive(self, version: int) -> bool:
        """Whether all holders have sent theirs."""
        return version in self._sums

    def receive(self, version: int) -> Tensor:
        """The sum; forgotten when every holder has received it."""
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
    """The exchange between processes: started at once, waited for as late as possible.

    Two holders all-reduce, since a sum of two does not depend on the order. More of them gather the gradients and add them up in the
    order of the stages, as the emulator does, so that the bits are equal.

    Args:
        timeout: seconds to wait for the others.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timedelta(seconds=timeout)
        self._holders: Rendezvous | None = None
        self._works: dict[int, tuple[Any, list[Tensor]]] = {}
        self._received: dict[int, Tensor] = {}

    def connect(self, holders: Rendezvous) -> None:
        """Use a group of ``holders`` for this alone, so that it waits for no activation and no activation for it."""
        self._holders = holders

    @property
    def group(self) -> dist.ProcessGroup:
        """That group."""
        assert self._holders is not None
        return self._holders.group("sums")

    def receive_pending(self) -> None:
        """Wait for what has been sent; :meth:`receive` returns it later."""
        self._received |= {version: self.receive(version) for version in list(self._works)}

    def abandon(self) -> None:
        self._works.clear()
        self._received.clear()

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
            # a + b = b + a bit for bit, so that the cheaper collective is exact here.
            if count == 2:
                every = [gradient]
                # In place: the gradient was handed over, and becomes the sum.
                work = dist.all_reduce(gradient, group=self.group, async_op=True)
            else:
                every = [torch.empty_like(gradient) for _ in range(count)]
                work = dist.all_gather(every, gradient, group=self.group, async_op=True)
        except RuntimeError as error:
            raise _failure(error) from error
        # The tensors are held with the work: the transport uses them until it is done.
        self._works[version] = work, every

    def can_receive(self, version: int) -> bool:
        return True

    def receive(self, version: int) -> Tensor:
        # Taken early by receive_pending(), before the group was closed.
        if version in self._received:
            return self._received.pop(version)
        work, every = self._works.pop(version)
        try:
            work.wait(self.timeout)
        except RuntimeError as error:
            raise _failure(error) from error
        return in_order(every)


def in_order(gradients: Sequence[Tensor]) -> Tensor:
    """Their sum from first to last, in the memory of the first: one order, so that all engines get the same bits."""
    found, *others = gradients
    for other in others:
        found.add_(other)
    return found


def _failure(error: RuntimeError) -> StageFailure:
    first = first_line(error)
    return StageFailure(f"a stage died or did not send its gradient of a tied weight ({first})")
