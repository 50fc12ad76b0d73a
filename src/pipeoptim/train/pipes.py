"""Making the engine of a run from its parts: the whole pipeline here, or the stage of this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

from pipeoptim.config import TrainConfig
from pipeoptim.train.parts import Parts

if TYPE_CHECKING:
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


def _options(config: TrainConfig) -> dict[str, Any]:
    """What both engines are told alike."""
    import torch

    from pipeoptim.engine import Clip, Compression, Trace

    return {
        "clip": Clip(config.clip, config.clip_scope) if config.clip else None,
        "autocast": getattr(torch, config.autocast) if config.autocast else None,
        "compress": Compression(config.compress, config.compress, config.error_feedback) if config.compress else None,
        "monitor": config.monitor_every,
        "trace": Trace(config.trace_steps) if config.trace else None,
    }


def emulator(parts: Parts, loss: LossFn) -> tuple[Pipe, dict[int, Optimizer]]:
    """All stages in this process, and their optimizers."""
    from pipeoptim.engine import Emulator

    optimizers = [parts.optimizer(stage.parameters(), k) for k, stage in enumerate(parts.stages)]
    config = parts.config
    pipe = Emulator(
        parts.stages,
        optimizers,
        loss,
        method=config.method,
        microbatches=config.microbatches,
        schedulers=[parts.scheduler(optimizer) for optimizer in optimizers],
        prediction=config.prediction,
        seed=config.seed,
        tied=parts.tied,
        **_options(config),
    )
    return pipe, dict(enumerate(optimizers))


def schedule(parts: Parts, k: int, loss: LossFn) -> tuple[Pipe, dict[int, Optimizer]]:
    """Stage ``k`` in this process, the others in the other processes of the default process group."""
    import torch
    from torch.distributed.pipelining import PipelineStage

    from pipeoptim.engine import Schedule

    config, module = parts.config, parts.stages[k]
    optimizer = parts.optimizer(module.parameters(), k)
    stage = PipelineStage(module, k, config.stages, torch.device("cpu"))
    pipe = Schedule(
        stage,
        optimizer,
        loss,
        method=config.method,
        microbatches=config.microbatches,
        scheduler=parts.scheduler(optimizer),
        prediction=config.prediction,
        seed=config.seed,
        tied=parts.tied,
        **_options(config),
    )
    return pipe, {k: optimizer}
