"""The parts of an engine, recorded: each does what its base class does, and notes when. Used only where there is a trace."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Generic

from pipeoptim.engine.processes.exchange import Exchange, Received, Sent
from pipeoptim.engine.stage.update import StageUpdate
from pipeoptim.engine.stage.worker import StageWorker
from pipeoptim.engine.trace import TraceRow
from pipeoptim.engine.transport.compression import Compressor
from pipeoptim.engine.transport.link import Receiver, Sender, Waiting
from pipeoptim.engine.transport.message import Message
from pipeoptim.engine.transport.ports import Incoming, Outgoing
from pipeoptim.schedule import ActionKind


def noted_worker(row: TraceRow | None) -> Callable[..., StageWorker]:
    """What makes the worker of a stage."""
    return StageWorker if row is None else partial(TracedWorker, row)


def link_recorder(row: TraceRow | None) -> LinkRecorder | None:
    """What records the links of a stage."""
    return None if row is None else LinkRecorder(row)


def noted_exchange(row: TraceRow | None, plain: Exchange[Sent, Received]) -> Exchange[Sent, Received]:
    """``plain`` itself, or its recorded form."""
    return plain if row is None else TracedExchange(row, plain)


class TracedWorker(StageWorker):
    """Notes prediction, F, B and evaluation. Micro-batches are numbered from the beginning of training."""

    def __init__(self, row: TraceRow, *args: Any, **kwargs: Any) -> None:
        self.row = row
        super().__init__(*args, **kwargs)
        # Wrapped after the construction: the plain object is complete, and only its methods are exchanged.
        self.update = TracedUpdate(row, self.update)
        if self.compressor.compression is not None:
            self.compressor = TracedCompressor(row, self.compressor)

    def prepare(self, i: int) -> None:
        self.finish_update()
        # prepare() is called twice, by the runner and by forward(); the second call chooses nothing.
        if self.forward_weights.chosen is not None:
            return
        self.row.begin_micro_batch()
        began = self.row.now()
        super().prepare(i)
        chosen: Any = self.forward_weights.chosen
        # Without a copy the latest weights are used in place: nothing was predicted.
        if self.predictor is not None and chosen.copy is not None:
            self.row.add("predict", self._number(i), began)

    def forward(self, i: int, *args: Any, **kwargs: Any) -> Any:
        self.prepare(i)
        began = self.row.now()
        result = super().forward(i, *args, **kwargs)
        self.row.add(ActionKind.F.value, self._number(i), began)
        return result

    def backward(self, i: int, *args: Any, **kwargs: Any) -> Any:
        self.finish_update()
        began = self.row.now()
        result = super().backward(i, *args, **kwargs)
        self.row.add(ActionKind.B.value, self._number(i), began)
        return result

    def evaluate(self, args: Any, kwargs: dict[str, Any], target: Any = None) -> Any:
        began = self.row.now()
        result = super().evaluate(args, kwargs, target)
        self.row.add("evaluate", -1, began)
        return result

    def _number(self, i: int) -> int:
        # i counts from the last drain; the version of that moment says how many mini-batches came before.
        return self.weights.restart * self.program.microbatches + i


class TracedUpdate(StageUpdate):
    """Notes U when it is carried out, which may be later than when it was begun."""

    def __init__(self, row: TraceRow, plain: StageUpdate) -> None:
        vars(self).update(vars(plain))
        self.row = row

    def finish(self) -> None:
        # Before the update, which counts the version up: U(n) makes version n + 1 from n.
        version, began = self.weights.version, self.row.now()
        super().finish()
        self.row.add(ActionKind.U.value, version, began)


class TracedCompressor(Compressor):
    """Notes packing and unpacking."""

    def __init__(self, row: TraceRow, plain: Compressor) -> None:
        vars(self).update(vars(plain))
        self.row = row

    def pack_activations(self, i: int, tree: Any) -> Any:
        began = self.row.now()
        packed = super().pack_activations(i, tree)
        self.row.add("pack", -1, began)
        return packed

    def pack_gradients(self, i: int, tree: Any, loss_scale: float) -> Any:
        began = self.row.now()
        packed = super().pack_gradients(i, tree, loss_scale)
        self.row.add("pack", -1, began)
        return packed

    def unpack(self, tree: Any) -> Any:
        began = self.row.now()
        unpacked = super().unpack(tree)
        self.row.add("unpack", -1, began)
        return unpacked


class TracedExchange(Generic[Sent, Received]):
    """Notes the wait for what other stages tell: norms, or the gradients of tied weights."""

    def __init__(self, row: TraceRow, plain: Exchange[Sent, Received]) -> None:
        self.row, self.plain = row, plain
        # Bound once: only receive() can wait, so that only it is noted.
        self.send, self.can_receive, self.abandon = plain.send, plain.can_receive, plain.abandon

    def receive(self, version: int) -> Received:
        began = self.row.now()
        found = self.plain.receive(version)
        self.row.add("wait", version, began)
        return found


class LinkRecorder:
    """Records the messages that come in and go out, and the waits for them."""

    def __init__(self, row: TraceRow) -> None:
        self.row = row
        self._wait: tuple[Any, int] = (None, -1)  # when it began, and for which stage

    def incoming(self, link: Receiver) -> Incoming:
        return TracedReceiver(self.row, link)

    def outgoing(self, link: Sender) -> Outgoing:
        return TracedSender(self.row, link)

    def waiting(self, waiting: Waiting) -> Waiting:
        def recorded(peer: int | None) -> None:
            if peer is None:
                self.row.add("wait", -1, *self._wait)
            else:
                self._wait = self.row.now(), peer
            waiting(peer)

        return recorded


class TracedReceiver:
    """Notes each message that comes in: its number, its sender and its size."""

    def __init__(self, row: TraceRow, link: Receiver) -> None:
        self.row, self.link = row, link
        self.post_receive = link.post_receive

    def receive(self) -> Message:
        began, number = self.row.now(), self.link.sequence
        message = self.link.receive()
        self.row.add("receive", number, began, self.link.peer, self.link.size)
        return message


class TracedSender:
    """Notes each message that goes out."""

    def __init__(self, row: TraceRow, link: Sender) -> None:
        self.row, self.link = row, link

    def send(self, tree: Any, flags: int = 0, loss_scale: float = 0.0, share: tuple[int, int] = (0, 0)) -> None:
        began, number = self.row.now(), self.link.sequence
        self.link.send(tree, flags, loss_scale, share)
        self.row.add("send", number, began, self.link.peer, self.link.size)
