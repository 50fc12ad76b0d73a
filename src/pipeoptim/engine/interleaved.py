"""Several stages per process, on ``torch.distributed``, which take turns in the interleaved order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from torch.distributed.pipelining import PipelineStage
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pipeoptim.engine.per_stage import scalers_of
from pipeoptim.engine.process_pipeline import ProcessPipeline, StageArguments, check_started
from pipeoptim.engine.stage.worker import LossFn
from pipeoptim.engine.torch_stage import read_stage
from pipeoptim.errors import ConfigError
from pipeoptim.methods import Method
from pipeoptim.options import PROCESS_OPTIONS, ProcessKeywords, takes_options


@takes_options(PROCESS_OPTIONS)
class InterleavedSchedule(ProcessPipeline):
    """Trains V stages of a pipeline in this process: of D = V * P stages, stage k lives on process ``k mod P``.

    Takes the place of ``torch.distributed.pipelining.ScheduleInterleaved1F1B`` as :class:`~pipeoptim.Schedule` takes that of
    ``Schedule1F1B``. Nothing is flushed; the order is :class:`~pipeoptim.schedule.orders.AsyncInterleaved`, and version gaps are
    counted in it. ``Emulator(..., processes=P)`` has the same weights bit for bit.

    Args:
        stages: torch's ``PipelineStage`` for every stage of this process, in order.
        optimizers: one per stage, None for a stage without parameters.
        loss_fn, method, microbatches: as in :class:`~pipeoptim.Schedule`.
        schedulers: one per stage.
        options: see :class:`~pipeoptim.PipelineOptions`.

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

    _place_name = "process"

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
        for name, each in (("stages", stages), ("optimizers", optimizers), ("schedulers", schedulers)):
            if not isinstance(each, list | tuple) and not (each is None and name == "schedulers"):
                raise ConfigError(f"{name} is {each!r}, must be a list of one for each stage of this process")
        rates = [None] * len(stages) if schedulers is None else list(schedulers)
        if len(stages) < 2 or len(optimizers) != len(stages) or len(rates) != len(stages):
            raise ConfigError(
                f"{len(stages)} stages, {len(optimizers)} optimizers and {len(rates)} schedulers were given; give at least two stages "
                "and one of each for every stage, or use Schedule for one stage"
            )
        check_started()
        _check_places(stages)
        # The only option that is given per stage; the rest is one for all.
        scalers = scalers_of(len(stages), options.pop("scaler", None))
        given = [StageArguments(*each) for each in zip(stages, optimizers, rates, scalers, strict=True)]
        self._set_up(given, loss_fn, method, microbatches, options)


def _check_places(stages: Sequence[PipelineStage]) -> None:
    first = read_stage(stages[0], len(stages))
    processes = first.depth // len(stages)
    if processes == 1:
        raise ConfigError("all stages are in one process; there Emulator trains them")
    # Process p of P holds stages p, p + P, p + 2P, ...
    expected = list(range(first.k % processes, first.depth, processes))
    if [stage.stage_index for stage in stages] != expected:
        raise ConfigError(f"stages {[s.stage_index for s in stages]} were given in process {first.k}; it holds {expected}")
