"""One stage per process, on ``torch.distributed``: the same per-stage code as the emulator, with real transfers between."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Unpack

import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pipeoptim.engine import traced
from pipeoptim.engine.microbatches import MicroBatch, RowShare
from pipeoptim.engine.pipeline import CountedLoss, Pipeline, T
from pipeoptim.engine.processes.agreement import SharedSettings, check_agreement
from pipeoptim.engine.processes.gradient_exchange import AllReducedGradients
from pipeoptim.engine.processes.heartbeat import Heartbeat
from pipeoptim.engine.processes.norm_exchange import GatheredNorms, ProcessNorms
from pipeoptim.engine.processes.rendezvous import Rendezvous, uses_gloo
from pipeoptim.engine.processes.shared_memory import shared_memory_norms
from pipeoptim.engine.replicas.reduction import NO_REPLICAS, Reduction
from pipeoptim.engine.replicas.replica_set import ReplicaSet, broadcast_values, read_replicas
from pipeoptim.engine.stage.tied_weights import Tied, TieOnStage, check_tied_equal, describe_tied, read_tied
from pipeoptim.engine.stage.worker import LossFn
from pipeoptim.engine.torch_stage import read_stage
from pipeoptim.engine.trace import TraceRow
from pipeoptim.engine.transport.link import Receiver, Sender, pair
from pipeoptim.engine.transport.local_link import LocalReceiver, LocalSender
from pipeoptim.engine.transport.message import Message
from pipeoptim.engine.transport.pytree import as_args
from pipeoptim.engine.transport.staged_link import StagedReceiver, StagedSender, side_streams
from pipeoptim.engine.transport.unix_channel import connect_neighbours
from pipeoptim.errors import ConfigError, StageFailure
from pipeoptim.methods import Method
from pipeoptim.options import PROCESS_OPTIONS, PipelineOptions, ProcessKeywords, read_option, takes_options
from pipeoptim.schedule import Action, ActionKind

_STOP = 1
_PER_REPLICA = ("random", "compress")  # entries of a stage's state in which its replicas differ


@takes_options(PROCESS_OPTIONS)
class Schedule(Pipeline):
    """Trains one stage of a pipeline in this process; the other stages are in other processes.

    Takes the place of ``torch.distributed.pipelining.Schedule1F1B``, except that it steps the optimizer itself: drop your own
    ``optimizer.step()`` and ``zero_grad()``. All processes call ``step``, ``drain`` and ``eval_step`` in the same order.

    Args:
        stage: torch's ``PipelineStage``: the module, its place, its device and the group of the pipeline's processes.
        optimizer: of this stage's parameters; None if it has none.
        loss_fn: ``loss_fn(output, target) -> scalar``, mean over the micro-batch; used on the last stage.
        method, microbatches: as in :class:`~pipeoptim.Emulator`; equal in all processes, and so are prediction, clip, autocast, scaler,
            uneven, overlap, compress, replicas and tied.
        scheduler: of this stage's learning rate; advanced once per update.
        options: those of :class:`~pipeoptim.PipelineOptions`.

    Raises:
        ConfigError: no process group, processes and stages do not match, or the processes were given different settings.

    Example (under ``torchrun --nproc-per-node 2``)::

        stage = PipelineStage(module, rank, 2, device)
        schedule = po.Schedule(stage, torch.optim.AdamW(module.parameters()), loss_fn)
        for x, y in batches:
            schedule.step(x) if rank == 0 else schedule.step(target=y)
        schedule.drain()
    """

    _stages_here = 1  # stages per process (see InterleavedSchedule)
    rendezvous: Rendezvous
    _failed = False
    _from_previous: Receiver | None = None
    _from_next: Receiver | None = None
    _to_next: Sender | None = None
    _to_previous: Sender | None = None
    _norms: ProcessNorms | None = None
    _sums: Mapping[Tied, AllReducedGradients] = MappingProxyType({})
    _replicas: ReplicaSet | None = None
    _reduction: Reduction = NO_REPLICAS
    _heartbeat: Heartbeat | None = None

    def __init__(
        self,
        stage: PipelineStage,
        optimizer: Optimizer | None,
        loss_fn: LossFn,
        method: str | Method = "pipeoptim",
        microbatches: int = 1,
        *,
        scheduler: LRScheduler | None = None,
        **options: Unpack[ProcessKeywords],
    ) -> None:
        if not dist.is_initialized():
            raise ConfigError("no process group; start with torchrun and call torch.distributed.init_process_group() first")
        place = read_stage(stage, self._stages_here)
        timeout = read_option("timeout", options)
        self.rendezvous = self._tie(place.ranks, timeout)
        try:
            read = PipelineOptions.read("Schedule", PROCESS_OPTIONS, method, microbatches, options)
            super().__init__(read, place.depth, len(set(place.ranks)))
            self.k, self.device, self.ranks = place.k, place.device, place.ranks
            self._transport = read.transport
            if read.clip is not None and read.clip.exchanges:
                self._norms = ProcessNorms()
            copies = read_replicas(read.replicas, place.module)
            scaled = read.scaler is not None and read.scaler.is_enabled()
            shared = read_tied(read.tied, self.program, self.method, read.clip, scaled)
            self._sums = {tie: AllReducedGradients(timeout) for tie in shared if self.k in tie.holders}
            settings = read.describe(replicas=copies.count, tied=shared)
            if copies.count > 1:
                self._replicas = ReplicaSet(copies, place.k, place.depth, timeout, SharedSettings(settings, place.cut))
                self._reduction = self._replicas.reduction(place.module, optimizer, read.uneven)
            row = self._row(self.k, self.device) if copies.index == 0 else None
            worker = traced.worker(row)(
                place.module,
                optimizer,
                self.method,
                self.program,
                self.k,
                loss_fn,
                scheduler=scheduler,
                device=self.device,
                options=read,
                norms=None if self._norms is None else traced.exchange(row, self._norms),
                reduction=self._reduction,
                ties=[TieOnStage(tie, self.k, traced.exchange(row, own)) for tie, own in self._sums.items()],
            )
            self.worker = self._workers[self.k] = worker
            self._connect(read.liveness_timeout, SharedSettings(settings, place.cut), row)
            for tie, own in self._sums.items():
                weight = self.worker.tied_weight(tie)
                if weight is not None:
                    broadcast_values(weight.values, own.group, self.ranks[tie.holders[0]])
        except BaseException as error:
            self.rendezvous.abort(error)
            self._failed = True
            self.close()
            raise

    def close(self) -> None:
        """Give back the connections, process groups and threads. Call it in all processes, after the last :meth:`drain`.

        Waits for the last sends, but for nothing after a failure. A second call does nothing. State can still be read afterwards.
        """
        rest = not self._failed and not self._steps
        try:
            for link in (self._to_next, self._to_previous):
                if link is not None and not self._failed:
                    self._flush(link)
            for exchange in (self._norms, *self._sums.values()):
                if exchange is not None and rest and not self._closed:
                    self._guard(exchange.receive_pending)
        finally:
            self._closed = True
            for end in (self._from_previous, self._from_next, self._to_next, self._to_previous):
                if end is not None:
                    end.opposite = None  # else the two would keep each other, and their groups
                    end.close()
            self._from_previous = self._from_next = self._to_next = self._to_previous = None
            self._reduction.close()
            if self._norms is not None:
                self._norms.close()
            for sums in self._sums.values():
                sums.close(rest)
            if self._replicas is not None:
                self._replicas.close(rest)
            self._untie(rest)

    def _flush(self, link: Sender) -> None:
        try:
            self._guard(link.flush)
        except StageFailure:
            if not self._steps:
                raise  # else there was no drain, and nobody takes the last gradients; the wait ends when the peer closes

    def stage_state_dict(self, k: int) -> dict[str, Any]:
        """As :meth:`Pipeline.stage_state_dict <pipeoptim.engine.pipeline.Pipeline.stage_state_dict>`.

        With ``replicas`` all of them call it, and it holds the random numbers of all, and what their compression lost, so that
        saving one of them is enough.
        """
        state = super().stage_state_dict(k)
        if self._replicas is not None:
            for name in filter(state.__contains__, _PER_REPLICA):
                state[name] = {**state[name], "replicas": self._replicas.gather(state[name])}
        return state

    def load_stage_state_dict(self, k: int, state: dict[str, Any]) -> None:
        """As :meth:`Pipeline.load_stage_state_dict <pipeoptim.engine.pipeline.Pipeline.load_stage_state_dict>`.

        Each replica takes its own random numbers from it, and what its own compression lost; one that the state does not know
        draws new ones.
        """
        index = 0 if self._replicas is None else self._replicas.replicas.index
        for name in filter(state.__contains__, _PER_REPLICA):
            everyone = state[name].get("replicas", [])
            if self._replicas is not None and index < len(everyone):
                state = {**state, name: everyone[index]}
            elif index > 0:
                state = {**state, name: self.worker.state_dict()[name]}
        super().load_stage_state_dict(k, state)

    def _note_stop(self) -> None:
        if self._replicas is None:
            super()._note_stop()
        else:
            self._stop = self._replicas.agree_to_stop(self._stop_wanted) or self._stop

    # -- actions -----------------------------------------------------------------------------------------------------

    def _advance(self, micro_batches: list[MicroBatch], losses: list[CountedLoss]) -> None:
        first = self._steps * self.microbatches
        self._run(self.program.step(self.k, self._steps), first, micro_batches, losses, self.program.flushes)

    def _finish(self) -> None:
        self._run(self.program.drain(self.k, self._steps), 0, [], [], settle=True)
        self._hand_over()

    def _run(
        self, actions: list[Action], first: int, micro_batches: list[MicroBatch], losses: list[CountedLoss], settle: bool
    ) -> None:
        for action in actions:
            if action.kind is ActionKind.F:
                self._forward(action.number, micro_batches[action.number - first], losses)
            elif action.kind is ActionKind.B:
                self._backward(action.number)
            else:
                self.worker.update()
        if settle:
            self.worker.finish_update()

    def _hand_over(self) -> None:
        """Nothing that this stage sent waits for its device any more: the program may end without :meth:`close`."""
        for link in (self._to_next, self._to_previous):
            if link is not None:
                link.hand_over()

    def _forward(self, i: int, micro_batch: MicroBatch, losses: list[CountedLoss]) -> None:
        args, row_share = micro_batch.args, micro_batch.row_share
        if self._from_previous is not None:
            self._from_previous.post_receive()
            self.worker.prepare(i)  # predicts while the input is on its way
            message = self._receive_activation()
            args, row_share = as_args(self.worker.compressor.unpack(message.tree)), RowShare(*message.share)
            self.worker.note_overflow(message.loss_scale)
        output, share = self.worker.forward_part(i, args, micro_batch, row_share, self._splitter)
        if self._to_next is not None:
            packed = self.worker.compressor.pack_activations(i, output)
            self._to_next.send(packed, _STOP if self._stop else 0, self.worker.overflow_to_send(), row_share)
        elif not row_share.empty:
            losses.append((output, share))

    def _backward(self, i: int) -> None:
        if self._from_next is None:
            gradients = self.worker.backward(i, [])
        else:
            message = self._from_next.receive()
            gradients = self.worker.backward(i, self.worker.compressor.unpack(message.tree), message.loss_scale)
        if self._to_previous is not None:
            scale = self.worker.loss_scale
            self._to_previous.send(self.worker.compressor.pack_gradients(i, gradients, scale), loss_scale=scale)

    def _evaluate(self, micro_batch: MicroBatch) -> Tensor | None:
        args = micro_batch.args
        if self._from_previous is not None:
            args = as_args(self.worker.compressor.unpack(self._receive_activation().tree))
        output = self.worker.evaluate(args, micro_batch.kwargs.get(self.k, {}), micro_batch.target)
        if self._to_next is not None:
            self._to_next.send(output, _STOP if self._stop else 0)
            return None
        return output  # type: ignore[no-any-return]

    def _receive_activation(self) -> Message:
        assert self._from_previous is not None
        message = self._from_previous.receive()
        self._stop = bool(message.flags & _STOP)
        return message

    # -- processes -----------------------------------------------------------------------------------------------------

    def _guard(self, work: Callable[[], T]) -> T:
        """Run ``work``; when a neighbour fails, say which stage failed first."""
        if self._closed:
            raise ConfigError("the pipeline is closed; call close() after the last step and eval_step, or make a new one")
        try:
            return work()
        except StageFailure as error:
            self._failed = True
            cause = str(error) if self._heartbeat is None else self._heartbeat.cause(f"{error} [seen by stage {self.k}]")
            raise StageFailure(cause) from error
        except BaseException:
            self._failed = True  # this stage stopped midway, so close() must not wait for the others to finish with it
            raise

    def _meet(self, tie: Tied, sums: AllReducedGradients) -> None:
        """Find the other holders of a tied weight, who must move it alike."""
        assert self.ranks is not None
        ranks = [self.ranks[k] for k in tie.holders]
        holders = Rendezvous("tied", ranks, self.rendezvous.timeout.total_seconds(), f"holder {{}} of {tie.names[0]!r}")
        own = describe_tied(self.worker.tied_weight(tie), self.worker.optimizer, self.worker.scheduler)
        check_tied_equal(tie, holders.exchange_settings(own))
        sums.connect(holders)

    def _tie(self, ranks: tuple[int, ...], timeout: float) -> Rendezvous:
        return Rendezvous("pipeline", ranks, timeout)

    def _untie(self, wait: bool) -> None:
        if self._heartbeat is not None:
            self._heartbeat.close()
            self._heartbeat = None
        self.rendezvous.close(wait)

    def _connect(self, liveness: float | None, terms: SharedSettings, row: TraceRow | None) -> None:
        """A check that all agree; the watch; and one group per direction, so that neither waits for the other."""
        check_agreement(self.rendezvous, terms)
        for tie, sums in self._sums.items():
            self._meet(tie, sums)
        if liveness is not None and self.depth > 1:
            self._heartbeat = Heartbeat(self.rendezvous.clone_store(), self.k, self.depth, liveness)
        if liveness is not None and self._replicas is not None:
            self._replicas.start_heartbeat(liveness)
        waiting = self._heartbeat.note_wait if self._heartbeat is not None else _nobody_watches
        groups = [self.rendezvous.group(name) for name in ("activations", "gradients")]
        self._link(row, lambda direction, _: groups[direction], waiting)
        if self._norms is not None:  # in all processes, as they have agreed above
            board = shared_memory_norms(self.rendezvous, self._transport == "auto" and uses_gloo(), waiting)
            self._norms.connect(board or GatheredNorms(self.rendezvous.group("norms", "gloo"), self.rendezvous.timeout))

    def _link(
        self, row: TraceRow | None, group: Callable[[int, int], dist.ProcessGroup], waiting: Callable[[int | None], None]
    ) -> None:
        """The links to the stages before and after; ``group(direction, boundary)`` is what they go through."""
        assert self.ranks is not None
        ranks, timeout = self.ranks, self.rendezvous.timeout.total_seconds()
        streams = side_streams(self.device)
        in_host = self.device.type == "cpu" or streams is not None  # what travels is in the host's memory
        wanted = self._transport == "auto" and in_host and uses_gloo()
        near = connect_neighbours(self.rendezvous.store, self.k, self.depth, wanted, self.rendezvous.timeout)

        def ends(there: int, back: int, boundary: int, peer: int) -> tuple[Sender, Receiver]:
            """To and from ``peer``; the first two say in which direction messages go."""
            sender: Callable[..., Sender] = Sender
            receiver: Callable[..., Receiver] = Receiver
            if streams is not None:
                sender, receiver = partial(StagedSender, streams), partial(StagedReceiver, streams)
            elif (0, boundary) in near:
                sender, receiver = LocalSender, LocalReceiver
            rest = peer, ranks[peer], self.device, timeout, waiting
            carriers = [near.get((way, boundary)) or group(way, boundary) for way in (there, back)]
            # a receive that is never matched would keep a GPU's stream busy
            return sender(carriers[0], *rest), receiver(carriers[1], *rest, ahead=in_host)

        k = self.k
        if k > 0:
            self._to_previous, self._from_previous = ends(1, 0, k - 1, k - 1)
        if k < self.depth - 1:
            self._to_next, self._from_next = ends(0, 1, k, k + 1)
        for receives, sends in ((self._from_previous, self._to_previous), (self._from_next, self._to_next)):
            traced.links(row, receives, sends)
            pair(sends, receives)


def _nobody_watches(peer: int | None) -> None:
    """What a link reports its waits to when the watch is off."""
