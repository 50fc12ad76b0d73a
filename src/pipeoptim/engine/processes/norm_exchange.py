"""How stages exchange the norms of their gradients: in memory, which processes on one machine share, or by an all-gather."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from pipeoptim.engine.processes.exchange import LocalExchangeEnd, NormExchange
from pipeoptim.errors import StageFailure, first_line


class LocalNormExchange:
    """The exchange of stages that live in one process. Stage ``k`` uses ``exchange.end(k)``."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self._norms: dict[int, dict[int, float]] = {}
        self._takes: dict[int, int] = {}  # version -> stages that have received its norms

    def end(self, k: int) -> NormExchange:
        """The end of stage ``k``."""
        return LocalExchangeEnd(self, k)

    def send(self, k: int, version: int, norm: float) -> None:
        """Store the norm of stage ``k``."""
        self._norms.setdefault(version, {})[k] = norm

    def can_receive(self, version: int) -> bool:
        """Whether all stages have sent theirs."""
        return len(self._norms.get(version, ())) == self.depth

    def receive(self, version: int) -> list[float]:
        """All norms; forgotten when every stage has received them."""
        assert self.can_receive(version), f"the norms of version {version} are not complete"
        norms = self._norms[version]
        self._takes[version] = self._takes.get(version, 0) + 1
        if self._takes[version] == self.depth:
            del self._norms[version], self._takes[version]
        # In the order of stages, since total() adds them up in this order, and float64 sums depend on it.
        return [norms[k] for k in range(self.depth)]

    def abandon(self) -> None:
        """Forget all norms."""
        self._norms.clear()
        self._takes.clear()


class NormTransport(Protocol):
    """What carries a number per update between processes: a shared page (:mod:`~.shared_memory`), or :class:`GatheredNorms`."""

    def send(self, turn: int, number: float) -> None:
        """Send the ``turn``-th number of this stage to the others without waiting."""
        ...

    def receive(self, turn: int) -> list[float]:
        """The ``turn``-th number of every stage; once per turn."""
        ...

    def interrupt(self) -> None:
        """End a wait of this process, from another thread, and all later ones."""
        ...

    def close(self) -> None:
        """Release what it holds."""
        ...


class ProcessNorms:
    """The exchange between processes, of which each holds one stage. Norms travel in the order in which they are sent.

    ``in_flight``: the most micro-batches that stage 0 ever has in flight, which bounds how far stages are apart.
    """

    def __init__(self, in_flight: int = 0) -> None:
        self.in_flight = in_flight
        self._transport: NormTransport | None = None
        self._turn = 0
        self._turns: dict[int, int] = {}  # version -> when it was sent
        self._received: dict[int, list[float]] = {}

    def connect(self, transport: NormTransport) -> None:
        """Use ``transport``, which all processes have agreed on."""
        self._transport, self._turn = transport, 0  # turns are counted from its beginning

    def receive_pending(self) -> None:
        """Wait for what has been sent; :meth:`receive` returns it later."""
        # The list is made before: receive() takes versions out while this goes through them.
        self._received |= {version: self.receive(version) for version in list(self._turns)}

    def abandon(self) -> None:
        self._turns.clear()
        self._received.clear()

    def interrupt(self) -> None:
        """As :meth:`NormTransport.interrupt`."""
        if self._transport is not None:
            self._transport.interrupt()

    def close(self) -> None:
        """Close the transport."""
        if self._transport is not None:
            self._transport.close()
        self._transport = None
        self._turns.clear()

    def send(self, version: int, norm: float) -> None:
        assert self._transport is not None
        self._transport.send(self._turn, norm)
        # By turn and not by version: a resumed run begins with any version, a new transport with turn 0.
        self._turns[version] = self._turn
        self._turn += 1

    def can_receive(self, version: int) -> bool:
        return True

    def receive(self, version: int) -> list[float]:
        if version in self._received:
            return self._received.pop(version)
        assert self._transport is not None
        return self._transport.receive(self._turns.pop(version))


class GatheredNorms:
    """Sends numbers by an ``all_gather`` of one float64 per stage, started at once and waited for as late as possible.

    Args:
        group: for this alone and on the CPU, so that it waits for no activation and no activation for it.
        timeout: to wait for the others.
    """

    def __init__(self, group: dist.ProcessGroup, timeout: timedelta) -> None:
        self.timeout = timeout
        self._group: dist.ProcessGroup | None = group
        self._works: dict[int, tuple[Any, list[Tensor], Tensor]] = {}

    def send(self, turn: int, number: float) -> None:
        assert self._group is not None
        # float64, as the emulator's own norms: the bits must not depend on the way.
        mine = torch.tensor([number], dtype=torch.float64)
        every = [torch.empty(1, dtype=torch.float64) for _ in range(self._group.size())]
        try:
            self._works[turn] = dist.all_gather(every, mine, group=self._group, async_op=True), every, mine
        except RuntimeError as error:
            raise _failure(error) from error

    def receive(self, turn: int) -> list[float]:
        work, every, _ = self._works.pop(turn)
        try:
            work.wait(self.timeout)
        except RuntimeError as error:
            raise _failure(error) from error
        return [float(number) for number in every]

    def interrupt(self) -> None:
        """Nothing: the group's connections end with its rendezvous."""

    def close(self) -> None:
        self._group = None
        self._works.clear()


def _failure(error: RuntimeError) -> StageFailure:
    first = first_line(error)
    return StageFailure(f"a stage died or did not send the norm of its gradients ({first})")
