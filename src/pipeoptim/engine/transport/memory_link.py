"""Links between stages of one process: queues in memory, in place of what processes send each other."""

from __future__ import annotations

from collections import deque
from typing import Any

from pipeoptim.engine.transport.message import Message
from pipeoptim.engine.transport.ports import Ports
from pipeoptim.engine.transport.pytree import transferred


class MemoryLink:
    """One direction between two neighbouring stages.

    Args:
        copies: cut what is sent from the graph and copy it, as a transfer between processes does. Activations need that;
            gradients are tensors that nobody else uses any more.
    """

    def __init__(self, copies: bool) -> None:
        self.copies = copies
        self._queue: deque[Message] = deque()

    def send(self, tree: Any, flags: int = 0, loss_scale: float = 0.0, share: tuple[int, int] = (0, 0)) -> None:
        # Activations are copied at once: the sending stage may overwrite its output before the receiving one has its turn.
        self._queue.append(Message(transferred(tree) if self.copies else tree, flags, loss_scale, share))

    def post_receive(self) -> None:
        """Nothing to prepare: a message lies in the queue as soon as it was sent."""

    def can_receive(self) -> bool:
        """Whether a message is there: in one process nobody may wait for another stage."""
        return bool(self._queue)

    def receive(self) -> Message:
        return self._queue.popleft()


def memory_links(depth: int) -> tuple[list[MemoryLink], list[MemoryLink], list[Ports]]:
    """The links of a pipeline of ``depth`` stages in one process: activations and gradients by boundary, and the ports of each stage.

    Boundary k lies between stages k and k + 1.
    """
    activations = [MemoryLink(copies=True) for _ in range(depth - 1)]
    gradients = [MemoryLink(copies=False) for _ in range(depth - 1)]
    # Each entry is (from, to) of one neighbour: activations come from the previous stage, gradients from the next.
    before, after = (
        [(None, None), *zip(activations, gradients, strict=True)],
        [*zip(gradients, activations, strict=True), (None, None)],
    )
    return activations, gradients, [Ports(*previous, *following) for previous, following in zip(before, after, strict=True)]
