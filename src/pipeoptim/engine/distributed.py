"""One stage per process, on ``torch.distributed``: the same per-stage code as the emulator, with real transfers between."""

from __future__ import annotations

from typing import Unpack

from torch.distributed.pipelining import PipelineStage
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pipeoptim.engine.process_pipeline import ProcessPipeline, StageArguments, check_started
from pipeoptim.engine.stage.worker import LossFn
from pipeoptim.methods import Method
from pipeoptim.options import PROCESS_OPTIONS, ProcessKeywords, takes_options


@takes_options(PROCESS_OPTIONS)
class Schedule(ProcessPipeline):
    """Trains one stage of a pipeline in this process; the other stages are in other processes.

    Takes the place of ``torch.distributed.pipelining.Schedule1F1B``, except that it steps the optimizer itself: drop your own
    ``optimizer.step()`` and ``zero_grad()``. All processes call ``step``, ``drain`` and ``eval_step`` in the same order.

    Args:
        stage: torch's ``PipelineStage``: the module, its place, its device and the group of the pipeline's processes.
        optimizer: of this stage's parameters; None if it has none.
        loss_fn: ``loss_fn(output, target) -> scalar``, mean over the micro-batch; used on the last stage.
        method, microbatches: as in :class:`~pipeoptim.Emulator`; equal in all processes.
        scheduler: of this stage's learning rate; advanced once per update.
        options: see :class:`~pipeoptim.PipelineOptions`.

    Raises:
        ConfigError: no process group, processes and stages do not match, or the processes were given different settings.

    Example (under ``torchrun --nproc-per-node 2``)::

        stage = PipelineStage(module, rank, 2, device)
        schedule = po.Schedule(stage, torch.optim.AdamW(module.parameters()), loss_fn)
        for x, y in batches:
            schedule.step(x) if rank == 0 else schedule.step(target=y)
        schedule.drain()
    """

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
        # First: reading the stage asks for its process group.
        check_started()
        self._set_up([StageArguments(stage, optimizer, scheduler)], loss_fn, method, microbatches, options)
