"""Torch's own pipeline schedules as contenders: one training step of each, optimizer included, on stages made by the caller."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.distributed.pipelining import PipelineStage
from torch.optim import Optimizer

from pipeoptim.engine.stage.worker import LossFn

Step = Callable[[], None]
ModuleOf = Callable[[int, int], nn.Module]
"""``module_of(stage, depth)``: one stage of the model cut into ``depth`` of them."""

TORCH: dict[str, Callable[[int, int], list[int]]] = {
    "ScheduleGPipe": lambda p, _: [p],
    "Schedule1F1B": lambda p, _: [p],
    "ScheduleInterleaved1F1B": lambda p, processes: [p, p + processes],
    "ScheduleZBVZeroBubble": lambda p, processes: [p, 2 * processes - 1 - p],
}
"""Schedule -> which stages live on process ``p``."""


def possible(name: str, m: int, processes: int) -> bool:
    """Whether schedule ``name`` is defined for ``m`` micro-batches.

    >>> possible("ScheduleZBVZeroBubble", 2, 2), possible("ScheduleInterleaved1F1B", 3, 2), possible("ScheduleGPipe", 1, 2)
    (False, True, True)
    """
    if name == "ScheduleZBVZeroBubble":
        return m >= 2 * processes - 1  # fewer, and it asks for micro-batches that are not there
    if name == "ScheduleInterleaved1F1B":
        return m % max(1, m // processes) == 0
    return m >= processes or name == "ScheduleGPipe"


def depth_of(name: str, processes: int) -> int:
    """Stages of all processes together."""
    return processes * len(TORCH[name](0, processes))


def rival_step(
    name: str, module_of: ModuleOf, m: int, loss_fn: LossFn, optimizer: Callable[[nn.Module], Optimizer], x: Tensor, y: Tensor
) -> Step:
    """One step of torch's schedule ``name`` on this process's stages, and of their optimizer."""
    p, processes = dist.get_rank(), dist.get_world_size()
    numbers, depth = TORCH[name](p, processes), depth_of(name, processes)
    modules = nn.ModuleList([module_of(n, depth) for n in numbers])
    stages = [PipelineStage(module, n, depth, torch.device("cpu")) for module, n in zip(modules, numbers, strict=True)]
    schedule = getattr(pipelining, name)(stages if len(stages) > 1 else stages[0], m, loss_fn)
    opt = optimizer(modules)
    args, keywords = ((x,) if 0 in numbers else ()), ({"target": y} if depth - 1 in numbers else {})

    def step() -> None:
        schedule.step(*args, **keywords)
        opt.step()
        opt.zero_grad()

    return step
