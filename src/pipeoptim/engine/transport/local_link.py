"""Links to neighbours on this machine: in a format that is known, small messages go from tensors into tensors.

A message then costs one copy on either side, and no buffer. Everything rare (a new format, a large message) goes the way of
every link, through the same channel (see :mod:`pipeoptim.engine.transport.unix_channel`); the bytes are the same either way.
"""

from __future__ import annotations

import ctypes
from typing import Any

from torch import Tensor

from pipeoptim.engine.transport import message
from pipeoptim.engine.transport.link import Receiver, Sender
from pipeoptim.engine.transport.message import Message
from pipeoptim.engine.transport.unix_channel import UnixChannel
from pipeoptim.errors import StageFailure

_PADS = [bytes(n) for n in range(64)]  # tensors lie at multiples of 64 bytes: what is sent in between, and where it arrives
_SINKS = [(ctypes.c_char * n)() for n in range(64)]


class LocalSender(Sender):
    """As :class:`~pipeoptim.engine.transport.link.Sender`, to a stage on this machine."""

    channel: UnixChannel

    def send(self, tree: Any, flags: int = 0, loss_scale: float = 0.0, share: tuple[int, int] = (0, 0)) -> None:
        form = self.format
        if form is None or self.size > self.channel.small:
            super().send(tree, flags, loss_scale, share)
            return
        # The usual case: no flattening, no new Format, since the tree looks like the last one.
        tensors = message.unchanged(tree, form)
        if tensors is None:
            found, tensors = message.format_of(tree)
            if found != form:
                super().send(tree, flags, loss_scale, share)
                return
        if self._broken is not None:
            raise self._broken
        begin = message.header(self.sequence, flags, loss_scale, share, self._messages_taken())
        try:
            self.channel.wait_at_most(self.timeout)
            # The kernel copies before the call returns, so that the tensors need not be kept and may be overwritten.
            self.channel.put([begin, *_memory(tensors, form, _PADS)], self.size)
        except RuntimeError as error:  # raised by the next send, as by every sender
            self._broken = StageFailure(self._reason(error))
        self.sequence += 1


class LocalReceiver(Receiver):
    """As :class:`~pipeoptim.engine.transport.link.Receiver`, from a stage on this machine."""

    channel: UnixChannel

    def __init__(self, *args: Any, ahead: bool) -> None:
        super().__init__(*args, ahead=False)  # messages wait in the channel
        self._begin = (ctypes.c_char * message.HEADER)()

    def post_receive(self) -> None:
        if self.format is None or self.size > self.channel.small:
            super().post_receive()

    def receive(self) -> Message:
        form = self.format
        if form is None or self.size > self.channel.small:
            return super().receive()
        # Received straight into the tensors that the module gets: no buffer, no views, no copy.
        tensors = message.empty(form)
        self.waiting(self.peer)
        try:
            self.channel.wait_at_most(self.timeout)
            self.channel.get([self._begin, *_memory(tensors, form, _SINKS)], self.size)
        except RuntimeError as error:
            raise StageFailure(self._reason(error)) from error
        finally:
            self.waiting(None)
        header = self._checked_header(message.header_in(self._begin))
        # A notice has the size of the old format: what was read into the tensors means nothing.
        if header.following:
            return self._receive_described(header.following)
        self._note_taken(header)
        return Message(message.tree_of(tensors, form), header.flags, header.loss_scale, (header.rows, header.of))


def _memory(tensors: list[Tensor], form: message.Format, between: list[Any]) -> list[Any]:
    """The memory of ``tensors`` and what lies between them in a message, as buffers of one scattered read or write."""
    buffers: list[Any] = []
    for tensor, slot in zip(tensors, form.slots, strict=True):
        if slot.nbytes:
            # by address: numpy has no bfloat16, and a view of bytes would cost a new tensor
            buffers.append((ctypes.c_char * slot.nbytes).from_address(tensor.data_ptr()))
            if slot.nbytes % 64:
                buffers.append(between[64 - slot.nbytes % 64])
    return buffers
