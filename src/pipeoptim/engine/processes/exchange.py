"""What stages exchange once per update: norms of gradients, and the gradients of tied weights.

Values are keyed by the version of the weights that they will update, which for one mini-batch is the same on every stage::

    stage j   send(version, value)  --.                       .-->  receive(version) of every stage: the same bits
    stage k   send(version, value)  --'--> memory or network --'
"""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

from torch import Tensor

Sent = TypeVar("Sent", contravariant=True)
Received = TypeVar("Received", covariant=True)


class Exchange(Protocol[Sent, Received]):
    """The end that one stage holds."""

    def send(self, version: int, value: Sent, /) -> None:
        """Send ``value`` to the other stages without waiting. It belongs to the exchange from now on."""
        ...

    def can_receive(self, version: int) -> bool:
        """Whether :meth:`receive` would return; always true where the other stages act in processes of their own."""
        ...

    def receive(self, version: int) -> Received:
        """The result for ``version``, the same bits on all stages; once per version, in the order in which they were sent."""
        ...

    def abandon(self) -> None:
        """Forget what was sent and not received; between processes all of them do, and connect again."""
        ...


class LocalExchange(Protocol[Sent, Received]):
    """The exchange of stages that live in one process."""

    def send(self, k: int, version: int, value: Sent, /) -> None:
        """Store the value of stage ``k``."""
        ...

    def can_receive(self, version: int) -> bool:
        """Whether all stages have sent their values."""
        ...

    def receive(self, version: int) -> Received:
        """The result; forgotten when every stage has received it."""
        ...

    def abandon(self) -> None:
        """Forget everything."""
        ...


class LocalExchangeEnd(Generic[Sent, Received]):
    """The end of ``exchange`` that stage ``k`` holds."""

    def __init__(self, exchange: LocalExchange[Sent, Received], k: int) -> None:
        self.exchange, self.k = exchange, k
        # Only send() must know who calls: the result is the same for all.
        self.can_receive, self.receive, self.abandon = exchange.can_receive, exchange.receive, exchange.abandon

    def send(self, version: int, value: Sent, /) -> None:
        self.exchange.send(self.k, version, value)


NormExchange = Exchange[float, list[float]]
"""A stage sends the norm of its gradient and receives those of all stages, in their order."""

GradientExchange = Exchange[Tensor, Tensor]
"""A holder of a tied weight sends its gradient and receives the sum over all holders."""
