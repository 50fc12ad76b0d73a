"""How close the engine comes to its limit: stages that wait instead of computing, so that their time is known.

A stage emulates a device of fixed speed: the forward of a whole mini-batch takes t, the backward 2t, and a micro-batch its share
of them. The limit of an asynchronous pipeline is one mini-batch per time of the slowest stage, so
``efficiency = mini-batches per second x slowest stage's seconds per mini-batch``, 1 at best. Whatever is missing is overhead
of the engine and of the transfers, or, with synchronous schedules, the bubble. Many stages fit on few cores, since they wait.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.distributed.pipelining import PipelineStage

from pipeoptim.bench.processes import run_on_processes
from pipeoptim.bench.record import Record, Row
from pipeoptim.engine import Schedule

BATCH = 16
_SPIN = 0.0003  # seconds: the end of a wait is spun, since a sleep returns late


class Device:
    """A device of fixed speed. ``scale`` of mini-batch seconds; ``jitter`` is the sigma of a log-normal factor."""

    def __init__(self, seconds: float, jitter: float, seed: int) -> None:
        self.seconds, self.jitter = seconds, jitter
        self.random = random.Random(seed)
        self.busy = 0.0

    def work(self, share: float) -> None:
        """Take as long as the device takes for ``share`` of a forward of a mini-batch."""
        factor = self.random.lognormvariate(0.0, self.jitter) if self.jitter else 1.0
        start = time.perf_counter()
        end = start + self.seconds * share * factor
        if (left := end - start - _SPIN) > 0:
            time.sleep(left)
        while time.perf_counter() < end:
            pass
        self.busy += time.perf_counter() - start


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, device: Device) -> Tensor:
        ctx.device, ctx.share = device, x.shape[0] / BATCH
        device.work(ctx.share)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.device.work(2 * ctx.share)
        return gradients[0], None


class WaitingStage(nn.Module):
    """A stage of one small layer whose time is that of its device."""

    def __init__(self, device: Device, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.device = device

    def forward(self, x: Tensor) -> Tensor:
        """The layer, and the wait."""
        return _Wait.apply(self.layer(x), self.device)  # type: ignore[no-any-return,no-untyped-call]


def measure(
    depths: list[int],
    milliseconds: list[float],
    methods: list[str] | None = None,
    microbatches: list[int] | None = None,
    torch_microbatches: list[int] | None = None,
    jitter: float = 0.0,
    uneven: float = 0.0,
    width: int = 256,
    repeats: int = 3,
    steps: int = 40,
) -> Record:
    """Measure every combination of depth, stage time and contender.

    Args:
        depths: numbers of stages, each with one process of one thread.
        milliseconds: time of a stage for F and B of a mini-batch together (F one third of it).
        methods, microbatches: contenders of this library and their M.
        torch_microbatches: M of torch's ScheduleGPipe and Schedule1F1B.
        jitter: sigma of the log-normal factor on every wait.
        uneven: how much slower than the others the middle stage is, as a share.
        width: numbers per sample that travel between stages.
        repeats, steps: windows per contender, and mini-batches per window.
    """
    options = {
        "methods": methods or ["pipeoptim", "naive"],
        "microbatches": microbatches or [1],
        "torch_microbatches": torch_microbatches or [],
        "milliseconds": milliseconds,
        "jitter": jitter,
        "uneven": uneven,
        "width": width,
        "repeats": repeats,
        "steps": steps,
    }
    rows = []
    for depth in depths:
        found = run_on_processes("pipeoptim.bench.efficiency:stage", options, depth, threads=1, timeout=900)
        rows += [Row(**row) for row in found[0]]
    return Record("efficiency", "efficiency", {**options, "depths": depths}, rows)


def stage(**options: Any) -> list[dict[str, Any]]:
    """The part of one process."""
    rows = []
    for milliseconds in options["milliseconds"]:
        for m in options["microbatches"]:
            for method in options["methods"]:
                rows.append(_row(options, milliseconds, m, method, _ours, True))
        for m in options["torch_microbatches"]:
            for name in ("ScheduleGPipe", "Schedule1F1B"):
                rows.append(_row(options, milliseconds, m, name, _torchs, False))
    return rows


def _row(
    options: dict[str, Any], milliseconds: float, m: int, name: str, make: Callable[..., Any], ours: bool
) -> dict[str, Any]:
    k, depth = dist.get_rank(), dist.get_world_size()
    slow = 1.0 + (options["uneven"] if k == depth // 2 else 0.0)
    device = Device(milliseconds / 3000 * slow, options["jitter"], seed=k)
    step = make(WaitingStage(device, options["width"]), name, m, k, depth, options["width"])
    for _ in range(depth + 2):
        step()
    samples = []
    for _ in range(options["repeats"]):
        dist.barrier()
        device.busy, start = 0.0, time.perf_counter()
        for _ in range(options["steps"]):
            step()
        dist.barrier()
        seconds = time.perf_counter() - start
        busy = torch.tensor(device.busy)
        dist.all_reduce(busy, dist.ReduceOp.MAX)
        samples.append(float(busy) / seconds)
    settings = {"method": name, "microbatches": m, "depth": depth, "milliseconds": milliseconds, "ours": ours}
    return {"name": f"{name} M={m}, D={depth}, {milliseconds:g} ms", "samples": samples, "settings": settings}


def _ours(module: nn.Module, name: str, m: int, k: int, depth: int, width: int) -> Callable[[], None]:
    place = PipelineStage(module, k, depth, torch.device("cpu"))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    pipe = Schedule(place, optimizer, nn.functional.mse_loss, name, m, liveness_timeout=None)
    x = torch.ones(BATCH, width)
    return lambda: _forget(pipe.step(*((x,) if k == 0 else ()), target=x if k == depth - 1 else None))


def _torchs(module: nn.Module, name: str, m: int, k: int, depth: int, width: int) -> Callable[[], None]:
    place = PipelineStage(module, k, depth, torch.device("cpu"))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    schedule = getattr(pipelining, name)(place, m, nn.functional.mse_loss)
    x = torch.ones(BATCH, width)

    def step() -> None:
        schedule.step(*((x,) if k == 0 else ()), **({"target": x} if k == depth - 1 else {}))
        optimizer.step()
        optimizer.zero_grad()

    return step


def _forget(value: object) -> None:
    """For callers that want nothing back."""
