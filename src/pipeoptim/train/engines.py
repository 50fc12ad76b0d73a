"""Makes the engine of a run from its setup: the whole pipeline here, or the stages of this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from pipeoptim.engine.pipeline import Pipeline
from pipeoptim.options import OPTIONS, PROCESS_OPTIONS, options_of_run
from pipeoptim.schedule import slack_at_first
from pipeoptim.train.layout import layout_of
from pipeoptim.train.setup import RunSetup

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


LossFn = Callable[[Any, Any], Tensor]


def _options(setup: RunSetup, names: Sequence[str]) -> dict[str, Any]:
    """Those of an engine that takes the options called ``names``."""
    config = setup.config
    given = {"method": config.method, "microbatches": setup.sizes.at(0).microbatches, "seed": config.seed, "tied": setup.tied}
    return given | options_of_run(config, names) | {"on_update": setup.events.update_hook}


def make_emulator(setup: RunSetup, loss: LossFn) -> tuple[Pipeline, dict[int, Optimizer]]:
    """All stages in this process, and their optimizers."""
    from pipeoptim.engine import Emulator

    optimizers = [setup.optimizer(stage, k) for k, stage in enumerate(setup.stages)]
    rates = [setup.scheduler(optimizer) for optimizer in optimizers]
    layout = layout_of(setup.config)
    processes = layout.width if layout.chunks > 1 else None
    # Of a run on processes, an emulator checks what can be built, and moves its state to another cut: it measures no links.
    options = {**_options(setup, OPTIONS), "slack": slack_at_first(setup.config.slack)}
    pipe = Emulator(setup.stages, optimizers, loss, schedulers=rates, processes=processes, **options)
    return pipe, dict(enumerate(optimizers))


def make_schedule(
    setup: RunSetup, stages: Sequence[int], loss: LossFn, mesh: DeviceMesh | None
) -> tuple[Pipeline, dict[int, Optimizer]]:
    """``stages`` in this process, the others in other processes: of the default group, or of replicas laid out by ``mesh``."""
    import torch
    from torch.distributed.pipelining import PipelineStage

    from pipeoptim.engine import InterleavedSchedule, Schedule

    depth, device = setup.config.stages, torch.device("cpu")
    group = None if mesh is None else mesh["pipe"].get_group()
    made = [PipelineStage(setup.stages[k], k, depth, device, group=group) for k in stages]
    optimizers = {k: setup.optimizer(setup.stages[k], k) for k in stages}
    rates = [setup.scheduler(optimizer) for optimizer in optimizers.values()]
    replicas, survive = None if mesh is None else mesh["data"], setup.config.survive or None
    options = {**_options(setup, PROCESS_OPTIONS), "replicas": replicas, "survive": survive}
    if len(made) > 1:
        return InterleavedSchedule(made, list(optimizers.values()), loss, schedulers=rates, **options), optimizers
    return Schedule(made[0], optimizers[stages[0]], loss, scheduler=rates[0], **options), optimizers
