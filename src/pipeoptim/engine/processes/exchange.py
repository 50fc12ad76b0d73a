"""How stages tell each other something once per update: in the emulator on a board, between processes in other ways.

What is told is told apart by the version of the weights that it will update, which for one mini-batch is the same on every stage.
"""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

from torch import Tensor

Told = TypeVar("Told", contravariant=True)
Heard = TypeVar("Heard", covariant=True)


class Exchange(Protocol[Told, Heard]):
    """The end that one stage holds."""

    def post(self, version: int, told: Told, /) -> None:
        """Tell the others; does not wait. What is told is the exchange's own from now on."""
        ...

    def ready(self, version: int) -> bool:
        """Whether :meth:`take` will end; always, where the other stages act by themselves."""
        ...

    def take(self, version: int) -> Heard:
        """What came of it, the same bits on all of them; once per version, in the order in which they were posted."""
        ...


class Board(Protocol[Told, Heard]):
    """The exchange of stages that live in one process."""

    def post(self, k: int, version: int, told: Told, /) -> None:
        """Note what stage ``k`` tells."""
        ...

    def ready(self, version: int) -> bool:
        """Whether all have told theirs."""
        ...

    def take(self, version: int) -> Heard:
        """What came of it; forgotten when every one has taken it."""
        ...


class LocalExchangeEnd(Generic[Told, Heard]):
    """What stage ``k`` holds of ``board``."""

    def __init__(self, board: Board[Told, Heard], k: int) -> None:
        self.board, self.k = board, k
        self.ready, self.take = board.ready, board.take

    def post(self, version: int, told: Told, /) -> None:
        self.board.post(self.k, version, told)


Norms = Exchange[float, list[float]]
"""A stage tells the norm of its gradient, and hears those of all, in the order of the stages."""

Sums = Exchange[Tensor, Tensor]
"""A holder of a tied weight tells its gradient, and hears the sum over all holders."""
