"""Samples per second of the methods here and of torch's own schedules: same stages, same mini-batch, same processes, one run.

The contenders take turns in the same processes, window after window, so that whatever disturbs the machine disturbs all. A
window is timed from barrier to barrier; asynchronous pipelines stay filled from one window to the next, as they do in training.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import pipelining
from torch.distributed.pipelining import PipelineStage

from pipeoptim.bench.models import MODELS, Work
from pipeoptim.bench.processes import run_on_processes
from pipeoptim.bench.record import Record, Row
from pipeoptim.engine import Schedule

TORCH = ("ScheduleGPipe", "Schedule1F1B")
Step = Callable[[], None]


def measure(
    model: str = "mlp",
    batch: int = 64,
    optimizer: str = "AdamW",
    methods: list[str] | None = None,
    microbatches: list[int] | None = None,
    torch_microbatches: list[int] | None = None,
    processes: int = 2,
    repeats: int = 5,
    window: float = 1.0,
) -> Record:
    """Measure every contender.

    Args:
        model: a key of :data:`pipeoptim.bench.models.MODELS`.
        batch: size of the mini-batch.
        optimizer: a class of ``torch.optim``.
        methods: names in ``METHODS``.
        microbatches: M of the methods here.
        torch_microbatches: M of torch's schedules.
        processes: stages, one process of one thread each.
        repeats: windows per contender.
        window: seconds a window takes, about.

    Returns:
        One row per contender, in samples per second.
    """
    options = {
        "model": model,
        "batch": batch,
        "optimizer": optimizer,
        "methods": methods or ["pipeoptim", "naive"],
        "microbatches": microbatches or [1],
        "torch_microbatches": torch_microbatches or [2, 4, 8],
        "repeats": repeats,
        "window": window,
    }
    count = len(options["methods"]) * len(options["microbatches"]) + len(TORCH) * len(options["torch_microbatches"])  # type: ignore[arg-type]
    timeout = 120 + 10 * count * (repeats + 2) * window
    rows = run_on_processes("pipeoptim.bench.throughput:stage", options, processes, threads=1, timeout=timeout)[0]
    return Record("throughput", "samples/s", {**options, "processes": processes, "threads": 1}, [Row(**r) for r in rows])


def stage(
    model: str,
    batch: int,
    optimizer: str,
    methods: list[str],
    microbatches: list[int],
    torch_microbatches: list[int],
    repeats: int,
    window: float,
) -> list[dict[str, Any]]:
    """The part of one process: build all contenders, let them take turns, return their samples."""
    k, depth = dist.get_rank(), dist.get_world_size()
    contenders: dict[str, tuple[dict[str, Any], Step]] = {}
    for m in microbatches:
        for method in methods:
            step = _ours(_work(model, batch), optimizer, method, m, k, depth)
            contenders[f"{method} M={m}"] = ({"method": method, "microbatches": m, "ours": True}, step)
    for m in torch_microbatches:
        for name in TORCH:
            step = _torchs(_work(model, batch), optimizer, name, m, k, depth)
            contenders[f"torch {name} M={m}"] = ({"method": name, "microbatches": m, "ours": False}, step)
    counts = {name: _steps_in(step, window) for name, (_, step) in contenders.items()}
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, (_, step) in contenders.items():
            samples[name].append(batch * counts[name] / _seconds(step, counts[name]))
    return [{"name": name, "samples": samples[name], "settings": contenders[name][0]} for name in contenders]


def _work(model: str, batch: int) -> Work:
    torch.manual_seed(0)
    return MODELS[model](batch)


def _cut(work: Work, k: int, depth: int) -> nn.Module:
    per = len(work.blocks) / depth
    return nn.Sequential(*work.blocks[round(k * per) : round((k + 1) * per)])


def _ours(work: Work, optimizer: str, method: str, m: int, k: int, depth: int) -> Step:
    module = _cut(work, k, depth)
    place = PipelineStage(module, k, depth, torch.device("cpu"))
    opt = getattr(torch.optim, optimizer)(module.parameters(), lr=1e-3)
    pipe = Schedule(place, opt, work.loss_fn, method, m, liveness_timeout=None)
    args, target = ((work.x,) if k == 0 else ()), (work.y if k == depth - 1 else None)

    def step() -> None:
        pipe.step(*args, target=target)

    return step


def _torchs(work: Work, optimizer: str, name: str, m: int, k: int, depth: int) -> Step:
    module = _cut(work, k, depth)
    place = PipelineStage(module, k, depth, torch.device("cpu"))
    opt = getattr(torch.optim, optimizer)(module.parameters(), lr=1e-3)
    schedule = getattr(pipelining, name)(place, m, work.loss_fn)
    args, keywords = ((work.x,) if k == 0 else ()), ({"target": work.y} if k == depth - 1 else {})

    def step() -> None:
        schedule.step(*args, **keywords)
        opt.step()
        opt.zero_grad()

    return step


def _seconds(step: Step, count: int) -> float:
    dist.barrier()
    start = time.perf_counter()
    for _ in range(count):
        step()
    dist.barrier()
    return time.perf_counter() - start


def _steps_in(step: Step, window: float) -> int:
    """How many steps take about ``window`` seconds; the same number in every process."""
    _seconds(step, 5)
    count = torch.tensor(max(3.0, window * 10 / _seconds(step, 10)))
    dist.broadcast(count, 0)
    return int(count)
