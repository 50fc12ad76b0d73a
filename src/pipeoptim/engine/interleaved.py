"""Several stages per process, on ``torch.distributed``: the parts of one process, driven in the interleaved order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pipeoptim.engine.distributed import Schedule
from pipeoptim.engine.microbatches import MicroBatch
from pipeoptim.engine.pipeline import CountedLoss, Pipeline, T
from pipeoptim.engine.processes.agreement import SharedSettings, check_agreement
from pipeoptim.engine.processes.heartbeat import Heartbeat
from pipeoptim.engine.processes.rendezvous import Rendezvous
from pipeoptim.engine.stage.worker import LossFn
from pipeoptim.engine.torch_stage import read_stage
from pipeoptim.engine.trace import TraceRow
from pipeoptim.errors import ConfigError
from pipeoptim.methods import Method
from pipeoptim.options import PROCESS_OPTIONS, PipelineOptions, ProcessKeywords, takes_options
from pipeoptim.schedule import Action, ActionKind


@takes_options(PROCESS_OPTIONS)
class InterleavedSchedule(Pipeline):
    """Trains V stages of a pipeline in this process: of D = V * P stages, stage k lives on process ``k mod P``.

    Takes the place of ``torch.distributed.pipelining.ScheduleInterleaved1F1B`` as :class:`~pipeoptim.Schedule` takes that of
    ``Schedule1F1B``. Nothing is flushed; the order is :class:`~pipeoptim.schedule.orders.AsyncInterleaved`, and version gaps are
    counted in it. ``Emulator(..., processes=P)`` has the same weights bit for bit.

    Args:
        stages: torch's ``PipelineStage`` for every stage of this process, in order.
        optimizers: one per stage, None for a stage without parameters.
        loss_fn, method, microbatches: as in :class:`~pipeoptim.Schedule`.
        schedulers: one per stage.
        options: those of :class:`~pipeoptim.PipelineOptions`.

    Raises:
        ConfigError: fewer than two stages, stages on the wrong process, or as :class:`~pipeoptim.Schedule` does.

    Example (under ``torchrun --nproc-per-node 2``, 4 stages)::

        stages = [PipelineStage(modules[k], k, 4, device) for k in (rank, rank + 2)]
        optimizers = [torch.optim.AdamW(stage.submod.parameters()) for stage in stages]
        schedule = po.InterleavedSchedule(stages, optimizers, loss_fn)
        for x, y in batches:
            schedule.step(x) if rank == 0 else schedule.step(target=y)
        schedule.drain()
    """

    _place = "process"

    def __init__(
        self,
        stages: Sequence[PipelineStage],
        optimizers: Sequence[Optimizer | None],
        loss_fn: LossFn,
        method: str | Method = "pipeoptim",
        microbatches: int = 1,
        *,
        schedulers: Sequence[LRScheduler | None] | None = None,
        **options: Unpack[ProcessKeywords],
    ) -> None:
        rates = [None] * len(stages) if schedulers is None else list(schedulers)
        if len(stages) < 2 or len(optimizers) != len(stages) or len(rates) != len(stages):
            raise ConfigError(
                f"{len(stages)} stages, {len(optimizers)} optimizers and {len(rates)} schedulers were given; give at least two stages "
                "and one of each for every stage, or use Schedule for one stage"
            )
        if not dist.is_initialized():
            raise ConfigError("no process group; start with torchrun and call torch.distributed.init_process_group() first")
        first = read_stage(stages[0], len(stages))
        processes = first.depth // len(stages)
        if processes == 1:
            raise ConfigError("all stages are in one process; there Emulator trains them")
        expected = list(range(first.k % processes, first.depth, processes))
        if [stage.stage_index for stage in stages] != expected:
            raise ConfigError(f"stages {[s.stage_index for s in stages]} were given in process {first.k}; it holds {expected}")
        read = PipelineOptions.read("InterleavedSchedule", PROCESS_OPTIONS, method, microbatches, options)
        settings = SharedSettings(f"stages={first.depth} {read.describe()}", first.cut)
        self._shared = shared = _Shared(first.ranks, len(stages), settings, read.timeout, read.liveness_timeout)
        self._parts: dict[int, _Part] = {}
        self._steps = 0
        try:
            for stage, optimizer, rate in zip(stages, optimizers, rates, strict=True):
                part = _Part(shared, stage, optimizer, loss_fn, scheduler=rate, **read.keywords())
                self._parts[part.k] = part
        except BaseException:
            self._close(failed=True)
            raise
        super().__init__(read, first.depth, processes)
        self._workers = {k: part.worker for k, part in self._parts.items()}
        self.p, self.ranks, self.rendezvous = first.k, first.ranks, shared.rendezvous

    def close(self) -> None:
        """As :meth:`Schedule.close <pipeoptim.Schedule.close>`."""
        self._close(failed=any(part._failed for part in self._parts.values()))

    def _close(self, failed: bool) -> None:
        try:
            for part in self._parts.values():
                part._failed, part._steps = failed, self._steps
                part.close()
        finally:
            self._closed = True
            self._shared.close(not failed and not self._steps)

    def stage_state_dict(self, k: int) -> dict[str, Any]:
        """As :meth:`Schedule.stage_state_dict <pipeoptim.Schedule.stage_state_dict>`."""
        self._worker(k)
        return self._parts[k].stage_state_dict(k)

    def load_stage_state_dict(self, k: int, state: dict[str, Any]) -> None:
        """As :meth:`Schedule.load_stage_state_dict <pipeoptim.Schedule.load_stage_state_dict>`."""
        self._worker(k)
        self._parts[k].load_stage_state_dict(k, state)
        self._fed = self._worker(k).weights.version
        self._steps = 0

    def request_stop(self) -> None:
        """Ask the run to stop: on process 0, every process sees :attr:`stop_requested` after the same next step."""
        if self.p == 0:
            self._parts[0].request_stop()

    @property
    def stop_requested(self) -> bool:
        """Whether a stop was requested; equal on every process after the same step."""
        return any(part.stop_requested for part in self._parts.values())

    def _note_stop(self) -> None:
        self._parts[0]._note_stop()

    def _advance(self, micro_batches: list[MicroBatch], losses: list[CountedLoss]) -> None:
        self._run(self.program.process_step(self.p, self._steps), self._steps * self.microbatches, micro_batches, losses)

    def _finish(self) -> None:
        self._run(self.program.process_drain(self.p, self._steps), 0, [], [])
        for part in self._parts.values():
            part.worker.finish_update()
            part._hand_over()

    def _run(
        self, actions: list[tuple[int, Action]], first: int, micro_batches: list[MicroBatch], losses: list[CountedLoss]
    ) -> None:
        for k, (kind, i) in actions:
            part = self._parts[k]
            if kind is ActionKind.F:
                part._forward(i, micro_batches[i - first], losses)
            elif kind is ActionKind.B:
                part._backward(i)
            else:
                part.worker.update()

    def _evaluate(self, micro_batch: MicroBatch) -> Tensor | None:
        return [part._evaluate(micro_batch) for part in self._parts.values()][-1]

    def _guard(self, work: Callable[[], T]) -> T:
        return self._parts[self.p]._guard(work)


class _Shared:
    """What the parts of one process have in common: ties to the other processes, and one watch."""

    def __init__(
        self, ranks: tuple[int, ...], chunks: int, terms: SharedSettings, timeout: float, liveness: float | None
    ) -> None:
        members = ranks[: len(ranks) // chunks]
        self.chunks, self.processes, self.liveness = chunks, len(members), liveness
        self.rendezvous = Rendezvous("pipeline", members, timeout, "process {}")
        check_agreement(self.rendezvous, terms)
        self.heartbeat: Heartbeat | None = None
        if liveness is not None:
            self.heartbeat = Heartbeat(
                self.rendezvous.clone_store(), self.rendezvous.index, len(members), liveness, "process {}"
            )
        for boundary in range(0, len(ranks), self.processes):
            for direction in (0, 1):
                self.group(direction, boundary)

    def group(self, direction: int, boundary: int) -> dist.ProcessGroup:
        """One of its own for either direction and every round of stages."""
        return self.rendezvous.group(f"{('activations', 'gradients')[direction]} {boundary // self.processes}")

    def close(self, wait: bool) -> None:
        """Give back the groups, and stop the watch."""
        if self.heartbeat is not None:
            self.heartbeat.close()
            self.heartbeat = None
        self.rendezvous.close(wait)

    def waiting(self, peer: int | None) -> None:
        """Note that this process begins (or, with None, ends) to wait for stage ``peer``."""
        if self.heartbeat is not None:
            self.heartbeat.note_wait(None if peer is None else peer % self.processes)


class _Part(Schedule):
    """One stage of this process, with its links to the stages before and after it."""

    def __init__(self, shared: _Shared, *args: Any, **options: Any) -> None:
        self._shared, self._stages_here = shared, shared.chunks
        super().__init__(*args, **options)

    def _tie(self, ranks: tuple[int, ...], timeout: float) -> Rendezvous:
        return self._shared.rendezvous

    def _untie(self, wait: bool) -> None:
        """Not yet: other parts use them."""

    def _connect(self, liveness: float | None, terms: SharedSettings, row: TraceRow | None) -> None:
        self._heartbeat = self._shared.heartbeat
        if self._shared.liveness is not None and self._replicas is not None:
            self._replicas.start_heartbeat(self._shared.liveness)
        self._link(row, self._shared.group, self._shared.waiting)
