"""Carrying out the actions of one stage: receive from a neighbour, compute, send to the other. Every engine runs its stages by this.

An engine decides whose turn it is; a :class:`StageRunner` does not know whether its neighbours are in this process or in others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pipeoptim.engine.microbatches import BatchSplitter, MicroBatch, RowShare
from pipeoptim.engine.stage.worker import StageWorker
from pipeoptim.engine.stage_times import StageClock, now
from pipeoptim.engine.transport.message import Message
from pipeoptim.engine.transport.ports import Incoming, Ports
from pipeoptim.engine.transport.pytree import as_args
from pipeoptim.errors import CorruptionError, PipeOptimError, StageFailure
from pipeoptim.schedule import Action, ActionKind

STOP = 1
"""Flag of a message: a stop was requested. It travels with the activations, so all stages see it with the same mini-batch. With gradients
it is only the wish of a later stage, on its way to stage 0, which decides."""

EVALUATION = 2
"""Flag of a message: it belongs to an evaluation, so that no stage trains on it whose process was fed more mini-batches."""

CHANGE = 4
"""Flag of an empty message: mini-batches are cut into another number of micro-batches from here on; its other bits say how many."""

BAD = 8
"""Flag of a message with gradients: the loss of their mini-batch was not finite, so that no stage steps on it."""

EVALUATED = 16
"""Flag of an empty message: the stage has evaluated all batches that it was given; its other bits say how many."""

_NUMBER = 32  # the first of these other bits
_PURPOSES = {0: "trains", EVALUATION: "evaluates", CHANGE: "changes its number of micro-batches", EVALUATED: "has evaluated"}

CountedLoss = tuple[Tensor, float | None]
"""The loss of a micro-batch and its share of the mini-batch's; None for 1/M."""


class StageRunner:
    """Runs stage ``worker.k`` on its ``ports``.

    Args:
        worker: all numerics of the stage.
        splitter: says how much of the loss a micro-batch counts for.
        ports: to the stages before and after; may be replaced while nothing is in flight.

    Attributes:
        stop: whether a stop was requested, as of the newest activation.
        asks_stop: whether this stage or a later one wishes for it.
        clock: measures how long the stage computes and waits.
    """

    def __init__(self, worker: StageWorker, splitter: BatchSplitter, ports: Ports) -> None:
        self.worker, self.splitter, self.ports = worker, splitter, ports
        self.stop, self.asks_stop, self.clock = False, False, StageClock()

    def run(self, action: Action, micro_batches: Sequence[MicroBatch], losses: list[CountedLoss]) -> None:
        """Carry out ``action`` of the mini-batch cut into ``micro_batches``; the last stage appends to ``losses``."""
        kind, i = action
        if kind is ActionKind.F:
            self.forward(i, micro_batches[i % len(micro_batches)], losses)
        elif kind is ActionKind.B:
            self.backward(i)
        else:
            began = now()
            self.worker.update()
            self.clock.computed += now() - began

    def forward(self, i: int, micro_batch: MicroBatch, losses: list[CountedLoss]) -> None:
        """F of micro-batch ``i``, from the previous stage to the next."""
        worker, source, target = self.worker, self.ports.from_previous, self.ports.to_next
        args, row_share = micro_batch.args, micro_batch.row_share
        began, waited = now(), 0.0
        if source is not None:
            # Before the work of prepare(): a large message needs a posted receive to move while this stage computes.
            source.post_receive()
            worker.prepare(i)  # before the receive: an update and a prediction while the input is on its way
            asked = now()
            message = self._received(source, i)
            waited = now() - asked
            self._note_flags(message.flags, 0)
            # Before the send below, which passes the report on to the next stage.
            worker.note_overflow(message.loss_scale)
            args, row_share = as_args(worker.compressor.unpack(message.tree)), RowShare(*message.share)
        output: Any = None
        share: float | None = 0.0
        # Decided by the rows that stage 0 counted, so that all stages skip the same micro-batch.
        if row_share.empty:
            worker.skip(i)
        else:
            share = self.splitter.share(micro_batch, row_share, worker.is_last)
            output = worker.forward(i, args, micro_batch.kwargs.get(worker.k, {}), micro_batch.target, share)
        if target is not None:
            packed = worker.compressor.pack_activations(i, output)
            # An empty micro-batch is sent as well (None): the next stage counts messages, and flags travel with them.
            target.send(packed, STOP if self.stop else 0, worker.overflow_to_send(), row_share)
        elif not row_share.empty:
            losses.append((output, share))
        self.clock.waited += waited
        self.clock.computed += now() - began - waited

    def backward(self, i: int) -> None:
        """B of micro-batch ``i``, from the next stage to the previous."""
        worker, source, target = self.worker, self.ports.from_next, self.ports.to_previous
        began, waited = now(), 0.0
        if source is None:
            gradients = worker.backward(i, [])
        else:
            message = self._received(source, i)
            waited = now() - began
            self.asks_stop = self.asks_stop or bool(message.flags & STOP)
            received = worker.compressor.unpack(message.tree)
            gradients = worker.backward(i, received, message.loss_scale, bool(message.flags & BAD))
        if target is not None:
            scale = worker.loss_scale
            flags = (BAD if worker.finite.found else 0) | (STOP if self.asks_stop else 0)
            target.send(worker.compressor.pack_gradients(i, gradients, scale), flags, scale)
        self.clock.waited += waited
        self.clock.computed += now() - began - waited

    def _received(self, source: Incoming, i: int) -> Message:
        """What ``source`` brings for micro-batch ``i``."""
        try:
            return source.receive()
        except CorruptionError as error:
            n = self.worker.weights.restart + i // self.worker.program.microbatches
            raise CorruptionError(f"{error} (mini-batch {n}, counted from 0)") from error

    def evaluate(self, micro_batch: MicroBatch) -> tuple[Tensor | None, RowShare]:
        """Forward on the latest weights without gradient, uncompressed: the loss on the last stage, and the rows that stage 0 counted."""
        worker, source, target = self.worker, self.ports.from_previous, self.ports.to_next
        args, row_share = micro_batch.args, micro_batch.row_share
        if source is not None:
            message = source.receive()
            self._note_flags(message.flags, EVALUATION)
            args, row_share = as_args(message.tree), RowShare(*message.share)
        # The parts of the evaluation take the place of the last mini-batch's, as loss_parts promises.
        worker.losses.begin()
        output = worker.evaluate(args, micro_batch.kwargs.get(worker.k, {}), micro_batch.target)
        if target is None:
            return output, row_share
        # Uncompressed: the loss of an evaluation is that of the weights, not that of the transport.
        target.send(output, EVALUATION | (STOP if self.stop else 0), share=row_share)
        return None, row_share

    def end_evaluation(self, batches: int) -> None:
        """After the last of ``batches``: see that the previous stage had equally many, and tell the next stage.

        Without it, stages that were given different numbers would wait for each other until a time-out.

        Raises:
            StageFailure: they differ.
        """
        source, target = self.ports.from_previous, self.ports.to_next
        if source is not None:
            flags = source.receive().flags
            if flags & EVALUATION:
                raise StageFailure(_uneven_evaluation(self.worker.k - 1, self.worker.k, batches))
            self._note_flags(flags, EVALUATED)
        if target is not None:
            target.send(None, EVALUATED | batches << _NUMBER | (STOP if self.stop else 0))

    def pass_on_change(self, m: int) -> None:
        """Tell the next stage, after the previous one has told this one, that from here on mini-batches have ``m`` micro-batches.

        Raises:
            PipeOptimError: the previous stage does not, or says another number.
        """
        source, target = self.ports.from_previous, self.ports.to_next
        if source is not None:
            flags = source.receive().flags
            self._note_flags(flags, CHANGE)
            if flags >> _NUMBER != m:
                raise PipeOptimError(
                    f"stage {self.worker.k - 1} was told to cut mini-batches into {flags >> _NUMBER} micro-batches, stage {self.worker.k} "
                    f"into {m}; call set_microbatches() with the same number in all processes"
                )
        if target is not None:
            target.send(None, CHANGE | m << _NUMBER | (STOP if self.stop else 0))

    def _note_flags(self, flags: int, purpose: int) -> None:
        self.stop = bool(flags & STOP)
        found = flags & (EVALUATION | CHANGE | EVALUATED)
        if found == EVALUATED and purpose == EVALUATION:
            raise StageFailure(_uneven_evaluation(self.worker.k, self.worker.k - 1, flags >> _NUMBER))
        if found != purpose:
            remedy = (
                "call set_microbatches() in all processes, at the same mini-batch"
                if CHANGE in (found, purpose)
                else "their processes were given different numbers of mini-batches; give all processes equally many, from loaders of "
                "one length"
            )
            raise PipeOptimError(
                f"stage {self.worker.k - 1} {_PURPOSES[found]} while stage {self.worker.k} {_PURPOSES[purpose]}: {remedy}"
            )


def _uneven_evaluation(longer: int, shorter: int, batches: int) -> str:
    return (
        f"stage {longer} was given more batches to evaluate than stage {shorter}, which had {batches}; give all processes equally many, "
        "from loaders of one length"
    )
