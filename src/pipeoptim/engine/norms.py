"""How stages tell each other the norms of their gradients: through memory in the emulator, one small message in processes.

Norms are told apart by the version of the weights that the gradients will update, which for one mini-batch is the same on
every stage.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from pipeoptim.errors import StageFailure


class Norms(Protocol):
    """The end of the exchange that one stage holds."""

    def post(self, version: int, norm: float) -> None:
        """Tell the others; does not wait."""
        ...

    def ready(self, version: int) -> bool:
        """Whether :meth:`take` will end; always, where the other stages act by themselves."""
        ...

    def take(self, version: int) -> list[float]:
        """The norms of all stages, in their order; once per version, in the order in which they were posted."""
        ...


class NormBoard:
    """The exchange of stages that live in one process. Stage ``k`` uses ``board.end(k)``."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self._norms: dict[int, dict[int, float]] = {}
        self._takes: dict[int, int] = {}

    def end(self, k: int) -> Norms:
        """What stage ``k`` holds."""
        return _BoardEnd(self, k)

    def post(self, k: int, version: int, norm: float) -> None:
        """Note the norm of stage ``k``."""
        self._norms.setdefault(version, {})[k] = norm

    def ready(self, version: int) -> bool:
        """Whether all stages have noted theirs."""
        return len(self._norms.get(version, ())) == self.depth

    def take(self, version: int) -> list[float]:
        """All norms; forgotten when every stage has taken them."""
        assert self.ready(version), f"the norms of version {version} are not complete"
        norms = self._norms[version]
        self._takes[version] = self._takes.get(version, 0) + 1
        if self._takes[version] == self.depth:
            del self._norms[version], self._takes[version]
        return [norms[k] for k in range(self.depth)]


class _BoardEnd:
    def __init__(self, board: NormBoard, k: int) -> None:
        self.board, self.k = board, k

    def post(self, version: int, norm: float) -> None:
        self.board.post(self.k, version, norm)

    def ready(self, version: int) -> bool:
        return self.board.ready(version)

    def take(self, version: int) -> list[float]:
        return self.board.take(version)


class GatheredNorms:
    """The exchange between processes: an ``all_gather`` of one float64 per stage, started at once and waited for late.

    Args:
        depth: stages, one per process.
        timeout: seconds to wait for the others.
    """

    def __init__(self, depth: int, timeout: float) -> None:
        self.depth = depth
        self.timeout = timedelta(seconds=timeout)
        self._group: dist.ProcessGroup | None = None
        self._works: dict[int, tuple[Any, list[Tensor], Tensor]] = {}
        self._told: dict[int, list[float]] = {}

    def connect(self, group: dist.ProcessGroup) -> None:
        """Use ``group``, one of its own and on the CPU: it waits for no activation, and no activation waits for it."""
        self._group = group

    def settle(self) -> None:
        """Wait for what has been posted; it can be taken later."""
        self._told |= {version: self.take(version) for version in list(self._works)}

    def close(self) -> None:
        """Let go of the group."""
        self._group = None
        self._works.clear()

    def post(self, version: int, norm: float) -> None:
        mine = torch.tensor([norm], dtype=torch.float64)
        every = [torch.empty(1, dtype=torch.float64) for _ in range(self.depth)]
        try:
            self._works[version] = dist.all_gather(every, mine, group=self._group, async_op=True), every, mine
        except RuntimeError as error:
            raise self._failure(error) from error

    def ready(self, version: int) -> bool:
        return True

    def take(self, version: int) -> list[float]:
        if version in self._told:
            return self._told.pop(version)
        work, every, _ = self._works.pop(version)
        try:
            work.wait(self.timeout)
        except RuntimeError as error:
            raise self._failure(error) from error
        return [float(norm) for norm in every]

    def _failure(self, error: RuntimeError) -> StageFailure:
        first = (str(error).splitlines() or ["no reason given"])[0][:160]
        return StageFailure(f"a stage died or did not tell the norm of its gradients ({first})")
