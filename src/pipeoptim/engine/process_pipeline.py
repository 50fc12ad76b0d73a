"""Stages in this process, others in other processes, on ``torch.distributed``: what ``Schedule`` and ``InterleavedSchedule`` share."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.amp.grad_scaler import GradScaler
from torch.distributed.pipelining import PipelineStage
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pipeoptim.engine import auto_slack, traced
from pipeoptim.engine.automatic import settle_options
from pipeoptim.engine.pipeline import Pipeline
from pipeoptim.engine.processes.agreement import SharedSettings, check_agreement
from pipeoptim.engine.processes.connect import Connections, Endpoint, Interruptible, connect
from pipeoptim.engine.processes.crowded_cores import own_core_use
from pipeoptim.engine.processes.gradient_exchange import AllReducedGradients
from pipeoptim.engine.processes.norm_exchange import ProcessNorms
from pipeoptim.engine.processes.progress import ENDED, EVALUATES, TRAINS, TrainingProgress
from pipeoptim.engine.processes.rendezvous import Rendezvous
from pipeoptim.engine.replicas.replica_set import ReplicaSet, broadcast_values, read_replicas
from pipeoptim.engine.runner import StageRunner
from pipeoptim.engine.stage.reduction import NO_REPLICAS, Reduction
from pipeoptim.engine.stage.state import check_state
from pipeoptim.engine.stage.tied import Tied
from pipeoptim.engine.stage.tied_weights import (
    TiedWeight,
    TieOnStage,
    carried_ties,
    check_tied_equal,
    describe_tied,
    read_tied,
)
from pipeoptim.engine.stage.worker import LossFn
from pipeoptim.engine.stage_times import WINDOW, StageTimes
from pipeoptim.engine.survival import Survival, check_survives
from pipeoptim.engine.torch_stage import StagePlace, read_stage
from pipeoptim.engine.transport.link import Sender
from pipeoptim.engine.transport.ports import Ports
from pipeoptim.errors import ConfigError, PipeOptimError, StageFailure, first_line
from pipeoptim.methods import Method
from pipeoptim.options import PROCESS_OPTIONS, PipelineOptions, read_option
from pipeoptim.schedule import AUTO, Program, Slack, describe_slack, messages_early, read_slack

_log = logging.getLogger("pipeoptim")

_PER_REPLICA = ("random", "compress")  # entries of a stage's state in which its replicas differ


def check_started() -> None:
    """Raises ConfigError where this process knows of no others."""
    if not dist.is_initialized():
        raise ConfigError("no process group; start with torchrun and call torch.distributed.init_process_group() first")


class StageArguments(NamedTuple):
    """What a user gives for each stage."""

    stage: PipelineStage
    optimizer: Optimizer | None
    scheduler: LRScheduler | None
    scaler: GradScaler | None = None  # by default that of the options


class _Guard:
    """When another process fails while this one waits in the block, says which one failed first."""

    __slots__ = ("_pipeline",)

    def __init__(self, pipeline: ProcessPipeline) -> None:
        self._pipeline = pipeline

    def __enter__(self) -> None:
        if self._pipeline._closed:
            raise ConfigError("the pipeline is closed; call close() after the last step and eval_step, or make a new one")

    def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> None:
        if error is not None:
            self._pipeline._explain(error)


class ProcessPipeline(Pipeline):
    """The stages of this process, of a pipeline of several processes."""

    rendezvous: Rendezvous
    ranks: tuple[int, ...]
    _failed = False
    _norms: ProcessNorms | None = None  # of gradients, where clipping needs those of all stages
    _tied_exchanges: Mapping[Tied, AllReducedGradients] = MappingProxyType({})  # of the gradients of each tied weight held here
    _connections: Connections | None = None
    _survival: Survival | None = None  # where this process can be replaced
    _doing: str  # what the newest call began: training, an evaluation, or the end of either
    _evaluated: int  # batches of the evaluation in progress
    _evaluations: int  # complete ones, at this rendezvous

    def _set_up(
        self,
        given: Sequence[StageArguments],
        loss_fn: LossFn,
        method: str | Method,
        microbatches: int,
        options: Mapping[str, Any],
    ) -> None:
        """Create the stages and connect them; where one process cannot, all of them fail with its reason."""
        places = [read_stage(arguments.stage, len(given)) for arguments in given]
        self.ranks = places[0].ranks
        self._runners = {}  # until there are some: close() ends what a failed set-up has begun
        self._reductions: list[Reduction] = []
        self._replica_sets: dict[int, ReplicaSet] = {}
        self._endpoints: dict[int, Endpoint] = {}
        # Each process once: with several stages per process, the ranks repeat from the second round on.
        members = self.ranks[: len(self.ranks) // len(given)]
        # Before anything that may be refused: from here on a process that fails can tell the others so.
        self._meet(Rendezvous("pipeline", members, read_option("timeout", options), f"{self._place_name} {{}}"))
        with self._closed_on_error():
            own = [arguments.optimizer for arguments in given]
            read = settle_options(
                lambda method: PipelineOptions.read(type(self).__name__, PROCESS_OPTIONS, method, microbatches, options),
                method,
                options.get("prediction"),
                own,
                len(self.ranks),
                len(members),
            )
            super().__init__(read, len(self.ranks), len(members))
            self._processes = (self.rendezvous.index,)
            # Before the workers, which hold their ends; connected later, when all processes have agreed.
            self._make_exchanges(places, given)
            if self.options.survive is not None:
                check_survives(self.options, places, self._tied_exchanges)
                self._survival = Survival(self.options.survive, places[0].k, self.depth)
            for place, arguments in zip(places, given, strict=True):
                self._runners[place.k] = self._make_runner(place, arguments, loss_fn)
            self._connect()
            self._measure_from_now()
            for tie, exchange in self._tied_exchanges.items():
                weight = self._tied_weight(tie)
                if weight is not None:
                    # From the first holder, as the emulator does: copies must begin equal, masters included.
                    broadcast_values(weight.values, exchange.group, self.ranks[tie.holders[0]])

    def _meet(self, rendezvous: Rendezvous) -> None:
        """Meet the other processes at ``rendezvous``; what was counted for the one before it begins anew with all of them."""
        self.rendezvous, self._progress = rendezvous, TrainingProgress(rendezvous)
        self._doing, self._evaluated, self._evaluations = ENDED, 0, 0

    @contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        """While processes connect: where one cannot, the others need not wait for it."""
        try:
            yield
        except BaseException as error:
            self.rendezvous.abort(error)
            self._failed = True
            self.close()
            raise

    def _make_exchanges(self, places: Sequence[StagePlace], given: Sequence[StageArguments]) -> None:
        """What stages tell each other once per update; what all processes must have been given alike."""
        options, (place, *_) = self.options, places
        if options.clip is not None and options.clip.exchanges:
            most = replace(self.program, slack=auto_slack.MOST) if options.slack == AUTO else self.program
            self._norms = ProcessNorms(most.in_flight(0))
        scalers = [arguments.scaler or options.scaler for arguments in given]
        scaled = any(scaler is not None and scaler.is_enabled() for scaler in scalers)
        carried = carried_ties({place.k: place.module for place in places}, self.depth)
        tied = read_tied(options.tied, carried, self.program, self.method, options.clip, scaled)
        self._tied_exchanges = {tie: AllReducedGradients(options.timeout) for tie in tied if place.k in tie.holders}
        self._replicas = read_replicas(options.replicas, place.module)
        agreed = options.describe(replicas=self._replicas.count, tied=tied, scaler=scalers[0])
        cores = own_core_use(place.device.type == "cpu")
        self._settings = SharedSettings(f"stages={self.depth} {agreed}", place.cut, cores)

    def _make_runner(self, place: StagePlace, arguments: StageArguments, loss_fn: LossFn) -> StageRunner:
        """The stage ``place``, not connected yet."""
        scaler, on_update = arguments.scaler or self.options.scaler, self._changes.noted(self.options.on_update)
        options = replace(self.options, scaler=scaler, on_update=on_update)
        reduction: Reduction = NO_REPLICAS
        if self._replicas.count > 1:
            replicas = ReplicaSet(self._replicas, place.k, place.depth, options.timeout, self._settings)
            self._replica_sets[place.k] = replicas
            self._progress.join(replicas.rendezvous)
            reduction = replicas.reduction(place.module, arguments.optimizer, options.uneven, options.on_bad == "skip")
            self._reductions.append(reduction)
        # Replicas do the same at the same time: the first one's trace stands for all.
        row = self._trace_row(place.k, place.device) if self._replicas.index == 0 else None
        self._endpoints[place.k] = Endpoint(place.device, traced.link_recorder(row))
        worker = traced.noted_worker(row)(
            place.module,
            arguments.optimizer,
            self.method,
            self.program,
            place.k,
            loss_fn,
            scheduler=arguments.scheduler,
            device=place.device,
            options=options,
            norms=None if self._norms is None else traced.noted_exchange(row, self._norms),
            reduction=reduction,
            ties=[
                TieOnStage(tie, place.k, traced.noted_exchange(row, exchange)) for tie, exchange in self._tied_exchanges.items()
            ],
        )
        return StageRunner(worker, self._splitter, Ports())

    def _connect(self) -> None:
        """Check that all processes agree, and connect the stages of this one."""
        options = self.options
        # Before the groups of the pipeline are made: processes with other settings might make others, and wait in vain.
        check_agreement(self.rendezvous, self._settings)
        for tie, exchange in self._tied_exchanges.items():
            exchange.connect(self._meet_holders(tie))
        if self._survival is not None:
            self._connections = self._survival.connect(self.rendezvous, self._norms)
        else:
            self._connections = connect(
                self.rendezvous,
                self.ranks,
                self._endpoints,
                self._norms,
                options.transport,
                options.liveness_timeout,
                (*self._tied_exchanges.values(), *self._replica_sets.values()),
                self._windows(),
                options.checksums,
            )
        if options.liveness_timeout is not None:
            for replicas in self._replica_sets.values():
                # After the connections, whose interrupt() it calls.
                replicas.start_heartbeat(options.liveness_timeout, self._connections.interrupt)
        for k, runner in self._runners.items():
            # Ports are replaced and runners kept, so that worker, weights and optimizer survive a reconnection.
            runner.ports = self._connections.ports[k]

    def _meet_holders(self, tie: Tied) -> Rendezvous:
        """Find the other holders of a tied weight, who must move it alike."""
        ranks, timeout = [self.ranks[k] for k in tie.holders], self.options.timeout
        role, (number, generation) = f"tied {tie}", (self.rendezvous.number, self.rendezvous.generation)
        name = f"holder {{}} of {tie.names[0]!r}"
        holders = Rendezvous(role, ranks, timeout, name, number=number, generation=generation)
        worker = self._worker(next(k for k in tie.holders if k in self._runners))
        own = describe_tied(worker.tied_weight(tie), worker.optimizer, worker.scheduler)
        check_tied_equal(tie, holders.exchange_settings(own))
        return holders

    def _tied_weight(self, tie: Tied) -> TiedWeight | None:
        return next(runner.worker.tied_weight(tie) for k, runner in self._runners.items() if k in tie.holders)

    def _windows(self) -> list[int]:
        """Of each boundary, the messages that may come before they are wanted."""
        return [1 + messages_early(self.program.slack, boundary) for boundary in range(self.depth - 1)]

    # -- slack that is chosen ------------------------------------------------------------------------------------------

    def _measure_from_now(self) -> None:
        """With slack="auto": the next mini-batches are measured, after which it is chosen."""
        if self.options.slack == AUTO:
            if self._replica_sets:
                raise ConfigError(
                    "slack is 'auto', which is chosen for one pipeline, and this one has replicas, which might choose otherwise; give a "
                    "number, for example the one that a pipeline without replicas chose (pipe.slack)"
                )
            self._measured_at = self._fed + WINDOW + 2 + self.depth

    def restart_stage_times(self) -> None:
        """As of every pipeline; with slack="auto", mini-batches that have been measured for it are measured anew. In all processes."""
        super().restart_stage_times()
        if self._measured_at >= 0:
            self._measure_from_now()

    def _decide_slack(self) -> None:
        self._measured_at = -1
        self.drain()
        own = {k: self._measured(k) for k in self._runners}
        with self._guard():
            everyone = self.rendezvous.all_gather(f"slack/{self._fed}", json.dumps(own), "to choose the slack")
        found = {int(k): auto_slack.StageMeasurement(*one) for text in everyone for k, one in json.loads(text).items()}
        wanted = auto_slack.choose_slack([found[k] for k in range(self.depth)], self.program.interleaved)
        limited = {most: _at_most(wanted, most) for most in range(_largest(wanted), 0, -1)}
        # What stages refuse differs between processes, so that all of them take the most that nobody refuses.
        refused: dict[int, str] = {}
        with self._guard():
            own_refusals = json.dumps({most: text for most, less in limited.items() if (text := self._refusal(less))})
            for one in self.rendezvous.all_gather(f"slack refused/{self._fed}", own_refusals, "to choose the slack"):
                refused = {int(most): text for most, text in json.loads(one).items()} | refused
        chosen = next((less for most, less in limited.items() if most not in refused), None)
        if chosen is not None:
            self._use_program(self._program_with(self.microbatches, chosen))
        why = f", not {describe_slack(wanted)}: {refused[_largest(wanted)]}" if _largest(wanted) in refused else ""
        _log.info("slack %s was chosen from the first %d mini-batches%s", describe_slack(self.slack), self._fed, why)

    def _refusal(self, slack: Slack) -> str:
        """Why method, options or the stages of this process do not take ``slack``; empty where they do."""
        try:
            self._program_with(self.microbatches, slack)
        except ConfigError as error:
            return str(error)
        return ""

    def _measured(self, k: int) -> auto_slack.StageMeasurement:
        times, m, links = self.stage_times(k), self.microbatches, self._connections
        assert times is not None and links is not None  # there were enough mini-batches
        late = links.seconds_late(k, k - 1), links.seconds_late(k, k + 1)
        return auto_slack.StageMeasurement(times.computing / m, times.spread / m**0.5, *late)

    def _use_program(self, program: Program) -> None:
        super()._use_program(program)
        if self._connections is not None:
            self._connections.use_windows(self._windows())

    def stage_times(self, k: int) -> StageTimes | None:
        times, links = super().stage_times(k), self._connections
        if times is None or links is None:
            return times
        return times._replace(late_activations=links.lately_late(k, k - 1), late_gradients=links.lately_late(k, k + 1))

    # -- while it runs -------------------------------------------------------------------------------------------------

    def _run_drain(self) -> None:
        super()._run_drain()
        if self._connections is not None:
            # After a drain a script may end without close(); what still lies on the device would be lost then.
            self._connections.hand_over()

    def _note_training(self) -> None:
        if self._survival is not None:
            self._survival.begin_mini_batch(self._fed)
        self._doing, self._evaluated = TRAINS, 0
        self._progress.note_training()

    def _note_end(self, evaluated: int = 0) -> None:
        self._doing, self._evaluated = EVALUATES if evaluated else ENDED, evaluated
        if evaluated == 0:
            self._progress.note_end((self._fed, 0))
        elif evaluated == 1:  # once per evaluation; how many batches there were is told after the last
            self._progress.note_evaluation(self._fed)

    def _evaluate_all(self, batches: Iterator[Any]) -> dict[str, Any]:
        self._evaluated = 0
        try:
            return super()._evaluate_all(batches)
        except BaseException as error:
            # Of a loader, or of a batch that is refused: the others are on their way already, and wait for what will not come.
            if not self._failed:
                self._tell_others(f"left evaluate(), where it had begun {self._evaluated} batches", error)
            raise

    def _of_last_stage(self, result: dict[str, Any]) -> dict[str, Any]:
        self._doing = ENDED
        self._progress.note_end((self._fed, self._evaluated))
        for runner in self._runners.values():
            runner.end_evaluation(self._evaluated)
        self._evaluations += 1
        # Through the store, which carries text and keeps the bits of a float64 in its shortest decimal form.
        everyone = self.rendezvous.all_gather(f"evaluation/{self._evaluations}", json.dumps(result), "to the end of evaluate()")
        return json.loads(everyone[(self.depth - 1) % len(everyone)])  # type: ignore[no-any-return]

    def _cause(self, error: str, connections: Connections) -> str:
        """``error``, or why another process failed before; processes that were fed unequally wait for what nobody sends."""
        if connections.interrupted_by is None:  # else the store may have gone or hang
            place = self._fed + (self._doing == TRAINS), self._evaluated
            uneven = self._progress.difference(self._doing, place)
            error = f"{uneven} ({error})" if uneven else error
        return connections.cause(error)

    def _guard(self) -> _Guard:
        return _Guard(self)

    def _explain(self, error: BaseException) -> None:
        """An error ended what may have waited for another process: says which process failed first, or tells the others of this one."""
        if isinstance(error, StageFailure):
            self._failed = True
            raise StageFailure(
                str(error) if self._connections is None else self._cause(str(error), self._connections)
            ) from error
        self._tell_others("failed", error)

    def _tell_others(self, what: str, error: BaseException) -> None:
        """This process stopped midway, by an error of its own, which it may survive: the others would wait for it until a time-out."""
        self._failed = True  # close() must not wait for the others to finish with it
        if self._connections is not None and isinstance(error, Exception):  # no time to lose where it is told to end
            kind = "" if isinstance(error, PipeOptimError) else f"{type(error).__name__}: "
            place = self.rendezvous.name.format(self.rendezvous.index)
            self._connections.cause(f"{place} {what}: {kind}{first_line(error)}")

    @contextmanager
    def meeting(self, place: Interruptible | None = None) -> Iterator[None]:
        """As :meth:`Pipeline.meeting <pipeoptim.engine.pipeline.Pipeline.meeting>`."""
        if self._closed or self._connections is None:  # nobody is watched any more
            yield
            return
        try:
            with self._connections.waiting_at(place):
                yield
        except RuntimeError as error:
            self._explain(
                error if isinstance(error, StageFailure) else StageFailure(f"the processes did not meet ({first_line(error)})")
            )

    def _note_stop(self) -> None:
        replicas = self._replica_sets.get(0)
        if replicas is not None:  # all of them must stop after the same mini-batch
            first = self._runners[0]
            first.stop = replicas.agree_to_stop(first.asks_stop) or first.stop
        elif self._survival is not None:
            first = self._runners[0]
            first.stop = self._survival.stops(self._fed, first.asks_stop)
        else:
            super()._note_stop()

    def _change_microbatches(self, m: int) -> None:
        for replicas in self._replica_sets.values():
            replicas.agree_on_microbatches(m, self._fed)
        super()._change_microbatches(m)

    def stage_state_dict(self, k: int) -> dict[str, Any]:
        """As :meth:`Pipeline.stage_state_dict <pipeoptim.engine.pipeline.Pipeline.stage_state_dict>`.

        With ``replicas`` all of them call it, and it holds the random numbers of all, and what their compression lost, so that
        saving one of them is enough.
        """
        state = super().stage_state_dict(k)
        if self.options.slack == AUTO and self._measured_at < 0:
            chosen = self.program.slack
            state["slack"] = list(chosen) if isinstance(chosen, tuple) else chosen
        replicas = self._replica_sets.get(k)
        if replicas is not None:
            for name in filter(state.__contains__, _PER_REPLICA):
                state[name] = {**state[name], "replicas": replicas.gather(state[name])}
        return state

    def load_stage_state_dict(self, k: int, state: dict[str, Any]) -> None:
        """As :meth:`Pipeline.load_stage_state_dict <pipeoptim.engine.pipeline.Pipeline.load_stage_state_dict>`.

        Each replica takes its own random numbers from it, and what its own compression lost; one that the state does not know
        draws new ones.
        """
        worker = self._worker(k)
        check_state(k, state)
        replicas = self._replica_sets.get(k)
        index = 0 if replicas is None else replicas.replicas.index
        for name in filter(state.__contains__, _PER_REPLICA):
            everyone = state[name].get("replicas", [])
            if replicas is not None and index < len(everyone):
                state = {**state, name: everyone[index]}
            elif index > 0:
                state = {**state, name: worker.state_dict()[name]}
        super().load_stage_state_dict(k, state)
        self._measure_from_now()
        if self.options.slack == AUTO and "slack" in state:
            self._measured_at = -1
            self._use_program(self._program_with(self.microbatches, read_slack(state["slack"])))

    # -- after a failure -----------------------------------------------------------------------------------------------

    def reconnect(self) -> None:
        """Give up what is in flight and connect anew, after a failure that this process survived. All processes call it.

        The mini-batches in flight are lost, and stages may have made different numbers of updates: before the next step, load on
        every stage what :meth:`stage_state_dict` gave at one drained boundary.

        Raises:
            ConfigError: the stage has replicas, whose connections are not made anew, or ``survive``; make a new pipeline then.
            StageFailure: another process did not come within the time-out.
        """
        if self._replica_sets:
            raise ConfigError("a pipeline with replicas cannot be connected anew; make a new one, and load the last checkpoint")
        if self._survival is not None:
            raise ConfigError("a pipeline with survive connects anew by itself; make a new one, and load the last checkpoint")
        if self._connections is not None:
            # The others may be waiting for this process, and must come here, too.
            self._connections.interrupt("another stage connects anew")
        for runner in self._runners.values():
            # Before the groups end: its exchanges and averages hold tensors and work handles of theirs.
            runner.worker.abandon()
        self._disconnect(wait=False)
        # Under new keys: nothing that the failed attempt left in the store can be mistaken for an answer.
        self._meet(self.rendezvous.next_generation())
        self._failed = self._closed = False
        self._steps = 0
        with self._closed_on_error():
            self._connect()

    # -- the end -------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Give back the connections, process groups and threads. Call it in all processes, after the last :meth:`drain`.

        Waits for the last sends, but for nothing after a failure. A second call does nothing. State can still be read afterwards.
        """
        at_rest = not self._failed and not self._steps
        if not self._failed and not self._closed:
            self._note_end()
        try:
            if self._connections is not None and not self._closed:
                self._finish_messages(self._connections)
        finally:
            self._closed = True
            at_rest = at_rest and not self._failed
            # Hooks and references first: a group whose last reference lives elsewhere would not end with its rendezvous.
            for reduction in self._reductions:
                reduction.close()
            for replicas in self._replica_sets.values():
                replicas.close(at_rest)
            self._disconnect(at_rest)

    def _disconnect(self, wait: bool) -> None:
        """Give back all that :meth:`_connect` has made; ``wait`` for its end, which comes at once where nothing is in flight."""
        for runner in self._runners.values():
            # Runners let go of their links, so that groups and sockets end here and not with the pipeline object.
            runner.ports = Ports()
        if self._connections is not None:
            self._connections.close(wait)
            self._connections = None
        if self._survival is not None:
            self._survival.close()
        for exchange in self._tied_exchanges.values():
            exchange.close(wait)
        self.rendezvous.close(wait)

    def _finish_messages(self, connections: Connections) -> None:
        """Wait until what was sent has arrived, and for what the others send in exchanges."""
        for sender in connections.senders:
            if not self._failed:
                self._flush(sender)
        for exchange in (self._norms, *self._tied_exchanges.values()):
            if exchange is not None and not self._failed and not self._steps:
                with self._guard():
                    exchange.receive_pending()

    def _flush(self, link: Sender) -> None:
        try:
            with self._guard():
                link.flush()
        except StageFailure:
            if not self._steps:
                raise  # else there was no drain, and nobody takes the last gradients; the wait ends when the peer closes


def _largest(slack: Slack) -> int:
    return int(max(slack, default=0) if isinstance(slack, tuple) else slack)


def _at_most(slack: Slack, most: int) -> Slack:
    return tuple(min(x, float(most)) for x in slack) if isinstance(slack, tuple) else min(slack, float(most))
