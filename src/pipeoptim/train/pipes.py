"""Making the engine of a run from its parts: the whole pipeline here, or the stages of this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

from pipeoptim.train.layout import layout_of
from pipeoptim.train.parts import Parts

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from pipeoptim.engine import PredictionError, Trace


class Pipe(Protocol):
    """What a run uses of ``Emulator`` and ``Schedule``."""

    @property
    def trace(self) -> Trace | None: ...
    @property
    def depth(self) -> int: ...
    @property
    def local_stages(self) -> list[int]: ...
    @property
    def stop_requested(self) -> bool: ...
    def step(self, *args: Any, target: Any = None) -> Tensor | None: ...
    def drain(self) -> None: ...
    def eval_step(self, *args: Any, target: Any = None, drain: bool = True) -> Tensor | None: ...
    def version(self, k: int) -> int: ...
    def version_gap(self, k: int) -> int: ...
    def weight_copies(self, k: int) -> int: ...
    def weight_bytes(self, k: int) -> int: ...
    def stage_state_dict(self, k: int) -> dict[str, Any]: ...
    def load_stage_state_dict(self, k: int, state: dict[str, Any]) -> None: ...
    def prediction_error(self, k: int) -> list[PredictionError]: ...
    def request_stop(self) -> None: ...
    def close(self) -> None: ...


LossFn = Callable[[Any, Any], Tensor]


def _options(parts: Parts) -> dict[str, Any]:
    """What both engines are told alike."""
    import torch

    from pipeoptim.engine import Clip, Compression, Trace

    config = parts.config
    return {
        "method": config.method,
        "microbatches": config.microbatches,
        "prediction": config.prediction,
        "seed": config.seed,
        "tied": parts.tied,
        "clip": Clip(config.clip, config.clip_scope) if config.clip else None,
        "autocast": getattr(torch, config.autocast) if config.autocast else None,
        "compress": Compression(config.compress, config.compress, config.error_feedback) if config.compress else None,
        "monitor": config.monitor_every,
        "overlap": config.overlap,
        "uneven": config.uneven,
        "recompute": config.recompute or "backward",
        "trace": Trace(config.trace_steps) if config.trace and parts.replica == 0 else None,
    }


def emulator(parts: Parts, loss: LossFn) -> tuple[Pipe, dict[int, Optimizer]]:
    """All stages in this process, and their optimizers."""
    from pipeoptim.engine import Emulator

    optimizers = [parts.optimizer(stage.parameters(), k) for k, stage in enumerate(parts.stages)]
    rates = [parts.scheduler(optimizer) for optimizer in optimizers]
    layout = layout_of(parts.config)
    processes = layout.width if layout.chunks > 1 else None
    pipe = Emulator(parts.stages, optimizers, loss, schedulers=rates, processes=processes, **_options(parts))
    return pipe, dict(enumerate(optimizers))


def schedule(parts: Parts, stages: Sequence[int], loss: LossFn, mesh: DeviceMesh | None) -> tuple[Pipe, dict[int, Optimizer]]:
    """``stages`` in this process, the others in other processes: of the default group, or of replicas laid out by ``mesh``."""
    import torch
    from torch.distributed.pipelining import PipelineStage

    from pipeoptim.engine import InterleavedSchedule, Schedule

    depth, device = parts.config.stages, torch.device("cpu")
    group = None if mesh is None else mesh["pipe"].get_group()
    made = [PipelineStage(parts.stages[k], k, depth, device, group=group) for k in stages]
    optimizers = {k: parts.optimizer(parts.stages[k].parameters(), k) for k in stages}
    rates = [parts.scheduler(optimizer) for optimizer in optimizers.values()]
    options = {**_options(parts), "replicas": None if mesh is None else mesh["data"]}
    if len(made) > 1:
        return InterleavedSchedule(made, list(optimizers.values()), loss, schedulers=rates, **options), optimizers
    return Schedule(made[0], optimizers[stages[0]], loss, scheduler=rates[0], **options), optimizers
