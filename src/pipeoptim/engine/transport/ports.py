"""What a stage sees of its neighbours: where it receives from and sends to, whether through memory, sockets or a process group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from pipeoptim.engine.transport.message import Message


class Incoming(Protocol):
    """Messages from one neighbour, in the order in which it sent them."""

    def post_receive(self) -> None:
        """Be ready for the next message, so that it can arrive while the stage computes."""
        ...

    def receive(self) -> Message:
        """The next message; waits for it where the neighbour is another process."""
        ...


class Outgoing(Protocol):
    """Messages to one neighbour."""

    def send(self, tree: Any, flags: int = 0, loss_scale: float = 0.0, share: tuple[int, int] = (0, 0)) -> None:
        """Send the message of these fields (see :class:`~pipeoptim.engine.transport.message.Message`); does not wait for it to arrive."""
        ...


@dataclass(frozen=True)
class Ports:
    """The connections of one stage; None on the side where it has no neighbour::

    stage k-1  --activations-->  from_previous [ stage k ] to_next    --activations-->  stage k+1
               <---gradients---  to_previous   [         ] from_next  <---gradients---
    """

    from_previous: Incoming | None = None
    to_previous: Outgoing | None = None
    from_next: Incoming | None = None
    to_next: Outgoing | None = None
