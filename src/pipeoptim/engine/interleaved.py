"""Several stages per process, on ``torch.distributed``: the parts of one process, driven in the interleaved order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store
from torch.distributed.pipelining import PipelineStage
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pipeoptim.engine import traced
from pipeoptim.engine.base import Counted, Pipeline
from pipeoptim.engine.compress import as_compression
from pipeoptim.engine.distributed import Schedule, agree, own_store
from pipeoptim.engine.feed import Cutter, Feed, StageKwargs, merge_kwargs
from pipeoptim.engine.link import pair
from pipeoptim.engine.stage import LossFn
from pipeoptim.engine.trace import Row
from pipeoptim.engine.upstream import read_stage
from pipeoptim.engine.watch import Watch
from pipeoptim.errors import ConfigError
from pipeoptim.methods import Method
from pipeoptim.schedule import Action, Kind


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
        timeout, liveness_timeout, options: as in :class:`~pipeoptim.Schedule`.

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

    def __init__(
        self,
        stages: Sequence[PipelineStage],
        optimizers: Sequence[Optimizer | None],
        loss_fn: LossFn,
        method: str | Method = "pipeoptim",
        microbatches: int = 1,
        *,
        schedulers: Sequence[LRScheduler | None] | None = None,
        timeout: float = 1800.0,
        liveness_timeout: float | None = 10.0,
        **options: Any,
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
        compress = as_compression(options.get("compress"))
        settings = f"method={method} microbatches={microbatches} stages={first.depth} compress={compress}"
        shared = _Shared(first.ranks, len(stages), settings, timeout, liveness_timeout)
        self._shared = shared
        self._parts: dict[int, _Part] = {}
        for stage, optimizer, rate in zip(stages, optimizers, rates, strict=True):
            part = _Part(shared, stage, optimizer, loss_fn, method, microbatches, scheduler=rate, timeout=timeout, **options)
            self._parts[part.k] = part
        parts = list(self._parts.values())
        overlap = parts[0].program.overlap
        trace = parts[0].trace
        super().__init__(method, first.depth, microbatches, parts[0]._cutter, parts[0]._recompute, processes, overlap, trace)
        self._workers = {k: part.worker for k, part in self._parts.items()}
        self.p, self.ranks = first.k, first.ranks
        self._guard: Callable[[Callable[[], Any]], Any] = parts[0]._guard

    def step(
        self,
        *args: Any,
        target: Any = None,
        losses: list[Tensor] | None = None,
        stage_kwargs: StageKwargs | None = None,
        **kwargs: Any,
    ) -> Tensor | None:
        """Feed one mini-batch, as :meth:`Schedule.step <pipeoptim.Schedule.step>`; the loss on the process of the last stage.

        Args:
            args: input of the model; process 0 only.
            target: for ``loss_fn``; process P-1 only.
            losses: a list that is filled with the loss of each micro-batch; process P-1 only.
            kwargs: for the first stage of this process.
            stage_kwargs: keyword arguments of the stages of this process.
        """
        if args and self.p > 0:
            raise ConfigError(
                f"process {self.p} was given {len(args)} inputs; only process 0 takes them, use keywords for others"
            )
        if self.p == 0:
            self._guard(self._parts[0]._note_stop)
        feeds = self._cut(self._cutter, args, kwargs, stage_kwargs, target)
        found: list[Counted] = []
        self._guard(lambda: self._run(self.program.process_step(self.p, self._steps), self._steps, feeds, found))
        self._steps += 1
        if self._synchronous():
            self.drain()
        return self._mean(found, losses)

    def drain(self) -> None:
        """Run the backwards and updates still in flight; afterwards every stage has the same version."""
        self._guard(lambda: self._run(self.program.process_drain(self.p, self._steps), 0, [], []))
        for worker in self._workers.values():
            self._guard(worker.settle)
        self._restart()

    def eval_step(
        self, *args: Any, target: Any = None, drain: bool = True, stage_kwargs: StageKwargs | None = None, **kwargs: Any
    ) -> Tensor | None:
        """Loss on the latest weights, as :meth:`Schedule.eval_step <pipeoptim.Schedule.eval_step>`."""
        if drain:
            self.drain()
        (feed,) = self._cut(Cutter(1, False, None), args, kwargs, stage_kwargs, target)
        return self._guard(lambda: [part._evaluate(feed) for part in self._parts.values()][-1])  # type: ignore[no-any-return]

    def close(self) -> None:
        """Wait for the last sends and stop the watch. Call it once, after the last :meth:`drain`."""
        for part in self._parts.values():
            part.close()

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

    def _cut(
        self, cutter: Cutter, args: Any, kwargs: dict[str, Any], stage_kwargs: StageKwargs | None, target: Any
    ) -> list[Feed]:
        every = merge_kwargs(self.depth, kwargs, self.p, stage_kwargs)
        mine = {k: own for k, own in every.items() if k in self._parts and own}
        return cutter.cut(f"the inputs of process {self.p}", args, mine, target)

    def _run(self, actions: list[tuple[int, Action]], n: int, feeds: list[Feed], losses: list[Counted]) -> None:
        for k, (kind, i) in actions:
            part = self._parts[k]
            if kind is Kind.F:
                part._forward(i, feeds[i - n * self.microbatches], losses)
            elif kind is Kind.B:
                part._backward(i)
            else:
                part.worker.update()


class _Shared:
    """What the parts of one process have in common: groups of their own for every round of stages, and one watch."""

    def __init__(self, ranks: tuple[int, ...], chunks: int, settings: str, timeout: float, liveness: float | None) -> None:
        members = ranks[: len(ranks) // chunks]
        self.chunks, self.processes = chunks, len(members)
        place = members.index(dist.get_rank())
        self.everywhere, store = own_store(members)
        agree(store, place, len(members), settings, timeout, "process")
        self.liveness, self.watch = liveness, None
        if liveness is not None and len(members) > 1:
            self.watch = Watch(_clone(store), place, len(members), liveness, "process {}")
        limit = timedelta(seconds=timeout)
        groups = [dist.new_group(list(members), limit, use_local_synchronization=True) for _ in range(2 * chunks)]
        self.activations, self.gradients = groups[:chunks], groups[chunks:]

    def waiting(self, peer: int | None) -> None:
        """Note that this process begins (or, with None, ends) to wait for stage ``peer``."""
        if self.watch is not None:
            self.watch.waiting(None if peer is None else peer % self.processes)


class _Part(Schedule):
    """One stage of this process, with its links to the stages before and after it."""

    def __init__(self, shared: _Shared, *args: Any, **options: Any) -> None:
        self._shared, self._stages_here = shared, shared.chunks
        super().__init__(*args, **options)

    def _connect(self, ranks: tuple[int, ...], timeout: float, liveness: float | None, settings: str, row: Row | None) -> None:
        shared = self._shared
        self._watch = shared.watch
        if shared.liveness is not None and self._replicas is not None:
            self._replicas.watch(_clone(shared.everywhere), shared.liveness)

        def end(groups: list[dist.ProcessGroup], boundary: int, peer: int) -> tuple[Any, ...]:
            return groups[boundary // shared.processes], peer, ranks[peer], self.device, timeout, shared.waiting

        ahead = self.device.type == "cpu"
        k, first, last = self.k, self.k == 0, self.k == self.depth - 1
        receiver, sender = traced.links(row)
        self._from_previous = None if first else receiver(*end(shared.activations, k - 1, k - 1), ahead=ahead)
        self._to_next = None if last else sender(*end(shared.activations, k, k + 1))
        self._from_next = None if last else receiver(*end(shared.gradients, k, k + 1), ahead=ahead)
        self._to_previous = None if first else sender(*end(shared.gradients, k - 1, k - 1))
        pair(self._to_next, self._from_next)
        pair(self._to_previous, self._from_previous)


def _clone(store: Store) -> Store:
    """A connection of its own: the watch must not wait behind others."""
    clone: Callable[[], Store] | None = getattr(store, "clone", None)
    return store if clone is None else clone()
