"""How stages tell each other something once per update: in the emulator on a board, between processes in other ways.

What is told is told apart by the version of the weights that it will update, which for one mini-batch is the same on every stage.
"""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

from torch import Tensor

Sent = TypeVar("Sent", contravariant=True)
Received = TypeVar("Received", covariant=True)


class Exchange(Protocol[Sent, Received]):
    """The end that one stage holds."""

    def send(self, version: int, told: Sent, /) -> None:
        """Tell the others; does not wait. What is told is the exchange's own from now on."""
        ...

    def can_receive(self, version: int) -> bool:
        """Whether :meth:`receive` will end; always, where the other stages act by themselves."""
        ...

    def receive(self, version: int) -> Received:
        """What came of it, the same bits on all of them; once per version, in the order in which they were sent."""
        ...

    def abandon(self) -> None:
        """Forget what was sent and not received; between processes all of them do, and connect again."""
        ...


class LocalExchange(Protocol[Sent, Received]):
    """The exchange of stages that live in one process."""

    def send(self, k: int, version: int, told: Sent, /) -> None:
        """Note what stage ``k`` tells."""
        ...

    def can_receive(self, version: int) -> bool:
        """Whether all have told theirs."""
        ...

    def receive(self, version: int) -> Received:
        """What came of it; forgotten when every one has taken it."""
        ...

    def abandon(self) -> None:
        """Forget all of it."""
        ...


class LocalExchangeEnd(Generic[Sent, Received]):
    """What stage ``k`` holds of ``board``."""

    def __init__(self, board: LocalExchange[Sent, Received], k: int) -> None:
        self.board, self.k = board, k
        self.can_receive, self.receive, self.abandon = board.can_receive, board.receive, board.abandon

    def send(self, version: int, told: Sent, /) -> None:
        self.board.send(self.k, version, told)


Norms = Exchange[float, list[float]]
"""A stage tells the norm of its gradient, and hears those of all, in the order of the stages."""

Sums = Exchange[Tensor, Tensor]
"""A holder of a tied weight tells its gradient, and hears the sum over all holders."""
