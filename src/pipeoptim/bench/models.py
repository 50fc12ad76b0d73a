"""The models that benchmarks run on: a builder returns flat blocks, an input batch, a target batch and a loss."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeoptim.engine.processes.collectives import broadcast_plain
from pipeoptim.engine.stage.worker import LossFn
from pipeoptim.errors import ConfigError
from pipeoptim.partitioning.balance import best_cut
from pipeoptim.train.targets import call, load


class Workload(NamedTuple):
    """What is trained: blocks to cut into stages, one mini-batch to feed again and again, and the loss.

    ``join`` makes a module of consecutive blocks.
    """

    blocks: list[nn.Module]
    x: Tensor
    y: Tensor
    loss_fn: LossFn
    join: Callable[..., nn.Module] = nn.Sequential


def mlp(batch: int, width: int = 512, layers: int = 8) -> Workload:
    """``layers`` of Linear(width, width) and ReLU."""
    blocks: list[nn.Module] = [nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(layers)]
    return Workload(blocks, torch.randn(batch, width), torch.randn(batch, width), nn.functional.mse_loss)


MODELS = {"mlp": mlp}


def build(model: str, batch: int) -> Workload:
    """The work of ``model``, a key of :data:`MODELS` or ``module:function`` of another builder, always with the same weights.

    Raises:
        ConfigError: it is neither, or does not return a :class:`Workload`.
    """
    builder = MODELS.get(model)
    if builder is None and ":" not in model:
        raise ConfigError(f"model {model!r} is not one of {', '.join(MODELS)}; name others as module:function")
    torch.manual_seed(0)
    work = call("model", builder or load("model", model), model, batch)
    if not isinstance(work, Workload):
        raise ConfigError(f"model {model!r} returned a {type(work).__name__}, must return a pipeoptim.bench.models.Workload")
    return work


def short_name(model: str) -> str:
    """What tables call it: ``pipeoptim_zoo.speed:gpt`` is gpt."""
    return model.rpartition(":")[2]


def cuts(work: Workload, depths: list[int]) -> dict[int, list[int]]:
    """For each depth, the blocks at which its stages begin and end, balanced by time measured in the first process."""
    found: dict[int, list[int]] = broadcast_plain(_cuts(work, depths) if dist.get_rank() == 0 else None, source=0)
    return found


def _cuts(work: Workload, depths: list[int]) -> dict[int, list[int]]:
    seconds = block_seconds(work)
    found = {}
    for depth in depths:
        lengths = best_cut(len(seconds), depth, lambda _, start, end: sum(seconds[start:end]))
        found[depth] = [sum(lengths[:n]) for n in range(depth + 1)]
    return found


def block_seconds(work: Workload, turns: int = 3) -> list[float]:
    """Seconds of F and B of a mini-batch, the fastest of some turns, of every block; the loss counts as part of the last."""
    fastest = [float("inf")] * len(work.blocks)
    for _ in range(turns):
        args: tuple[Any, ...] = (work.x,)
        for n, block in enumerate(work.blocks):
            leaves = tuple(a.detach().requires_grad_(a.is_floating_point()) for a in args)
            block.zero_grad(set_to_none=True)  # else the backward adds to what the last turn left
            start = time.perf_counter()
            out = block(*leaves)
            ends = out if isinstance(out, tuple) else (out,)
            if n == len(work.blocks) - 1:
                ends = (work.loss_fn(out, work.y),)
            roots = [t for t in ends if t.requires_grad]
            if roots:
                torch.autograd.backward(roots, [torch.ones_like(t) for t in roots])
            fastest[n] = min(fastest[n], time.perf_counter() - start)
            args = out if isinstance(out, tuple) else (out,)
    for block in work.blocks:
        block.zero_grad(set_to_none=True)
    return fastest
