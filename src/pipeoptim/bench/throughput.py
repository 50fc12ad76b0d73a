"""Samples per second of the methods here and of torch's own schedules: same model, same mini-batch, same processes, one run.

The contenders take turns in the same processes, window after window, so that whatever disturbs the machine disturbs all. A
window is timed from barrier to barrier; asynchronous pipelines stay filled from one window to the next, as they do in training.
Schedules with two stages per process get the same model cut into twice as many.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.optim import Optimizer

from pipeoptim.bench.checks import divide, runnable
from pipeoptim.bench.models import Workload, build, cuts, short_name
from pipeoptim.bench.processes import run_on_processes
from pipeoptim.bench.record import Record, ResultRow
from pipeoptim.bench.rivals import TORCH, Step, depth_of, possible, rival_step
from pipeoptim.engine import Schedule
from pipeoptim.errors import ConfigError
from pipeoptim.methods import METHODS, get_method


def measure(
    model: str = "mlp",
    batches: list[int] | None = None,
    optimizer: str = "AdamW",
    methods: list[str] | None = None,
    microbatches: list[int] | None = None,
    torch_microbatches: list[int] | None = None,
    processes: int = 2,
    repeats: int = 5,
    window: float = 0.5,
    fused: bool = False,
    refresh: list[int] | None = None,
) -> Record:
    """Measure every contender.

    Args:
        model: a key of :data:`pipeoptim.bench.models.MODELS`, or ``module:function`` of a builder.
        batches: sizes of the mini-batch, each measured in a run of its own.
        optimizer: a class of ``torch.optim``.
        methods: names in ``METHODS``; by default all.
        microbatches: M of the methods here; those that need more are measured with M = D as well.
        torch_microbatches: M of torch's schedules.
        processes: processes of one thread each.
        repeats: windows per contender.
        window: seconds a window takes, about.
        fused: give all contenders an optimizer with torch's fused step, instead of the default one.
        refresh: methods that predict by the optimizer's rule are measured as well with predictions from the mini-batch in progress, made
            anew after so many micro-batches.

    Returns:
        One row per contender and M, in samples per second.

    Raises:
        ConfigError: there is no such model, optimizer or method.
    """
    if not hasattr(torch.optim, optimizer):
        raise ConfigError(f"optimizer {optimizer!r} is not a class of torch.optim")
    shared = {
        "optimizer": optimizer,
        "methods": list(methods or METHODS),
        "microbatches": microbatches or [1, 2],
        "torch_microbatches": torch_microbatches or [1, 2, 4, 8],
        "repeats": repeats,
        "window": window,
        "fused": fused,
        "refresh": refresh or [],
    }
    runnable(
        [name for name in methods or () if not get_method(name).at_least_depth_microbatches], [processes], microbatches or [1]
    )
    divide(batches or [64], microbatches=microbatches, torch_microbatches=torch_microbatches)
    build(model, 1)  # refused here, and not by every process
    count = len(shared["methods"]) * (1 + len(shared["microbatches"])) * (1 + len(refresh or []))  # type: ignore[arg-type]
    count += len(TORCH) * len(shared["torch_microbatches"])  # type: ignore[arg-type]
    timeout = 120 + 10 * count * (repeats + 2) * window
    rows: list[ResultRow] = []
    for batch in batches or [64]:
        options = {**shared, "model": model, "batch": batch}
        found = run_on_processes("pipeoptim.bench.throughput:stage", options, processes, threads=1, timeout=timeout)[0]
        rows += [ResultRow(**row) for row in found]
    return Record(
        "throughput", "samples/s", {"optimizer": optimizer, "repeats": repeats, "processes": processes, "threads": 1}, rows
    )


def stage(**options: Any) -> list[dict[str, Any]]:
    """The part of one process: build all contenders, let them take turns, return their samples."""
    contenders = dict(_contenders(options))
    batch, window = options["batch"], options["window"]
    counts = {name: steps_in(step, window) for name, (_, step) in contenders.items()}
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(options["repeats"]):
        for name, (_, step) in contenders.items():
            samples[name].append(batch * counts[name] / seconds(step, counts[name]))
    return [{"name": name, "samples": samples[name], "settings": contenders[name][0]} for name in contenders]


def _contenders(options: dict[str, Any]) -> list[tuple[str, tuple[dict[str, Any], Step]]]:
    model, batch, p, processes = options["model"], options["batch"], dist.get_rank(), dist.get_world_size()
    depths = sorted({processes, *(depth_of(name, processes) for name in TORCH)})
    cut = cuts(build(model, batch), depths)

    def optimizer(module: nn.Module) -> Optimizer:
        how = {"fused": True} if options["fused"] else {}
        return getattr(torch.optim, options["optimizer"])(module.parameters(), lr=1e-3, **how)  # type: ignore[no-any-return]

    found = []
    label = short_name(model) + (" (fused step)" if options["fused"] else "")

    def add(name: str, m: int, ours: bool, step: Step, how: str = "") -> None:
        settings = {"model": label, "batch": batch, "method": name, "microbatches": m, "ours": ours}
        found.append((f"{label}, {batch}, {'' if ours else 'torch '}{name}{how} M={m}", (settings, step)))

    for name in options["methods"]:
        for m in options["microbatches"] + [processes] * METHODS[name].at_least_depth_microbatches:
            if batch % m == 0 and (m >= processes or not METHODS[name].at_least_depth_microbatches):
                for refresh in (None, *(options["refresh"] if METHODS[name].predicts_by_rule else ())):
                    work = build(model, batch)
                    how = {} if refresh is None else {"prediction": "in_progress", "refresh": refresh}
                    step = _ours(work, _part(work, cut, p, processes), optimizer, name, m, how)
                    add(name, m, True, step, "" if refresh is None else f" in_progress refresh={refresh}")
    for name in TORCH:
        for m in options["torch_microbatches"]:
            if batch % m == 0 and possible(name, m, processes):
                add(name, m, False, _torchs(build(model, batch), cut, optimizer, name, m))
    return list({name: (name, contender) for name, contender in found}.values())


def _part(work: Workload, cut: dict[int, list[int]], k: int, depth: int) -> nn.Module:
    return work.join(*work.blocks[cut[depth][k] : cut[depth][k + 1]])


def _ours(
    work: Workload,
    module: nn.Module,
    optimizer: Callable[[nn.Module], Optimizer],
    method: str,
    m: int,
    how: dict[str, Any],
) -> Step:
    k, depth = dist.get_rank(), dist.get_world_size()
    place = PipelineStage(module, k, depth, torch.device("cpu"))
    pipe = Schedule(place, optimizer(module), work.loss_fn, method, m, liveness_timeout=None, **how)
    args, target = ((work.x,) if k == 0 else ()), (work.y if k == depth - 1 else None)

    def step() -> None:
        pipe.step(*args, target=target)

    return step


def _torchs(work: Workload, cut: dict[int, list[int]], optimizer: Callable[[nn.Module], Optimizer], name: str, m: int) -> Step:
    return rival_step(name, lambda n, depth: _part(work, cut, n, depth), m, work.loss_fn, optimizer, work.x, work.y)


def seconds(step: Step, count: int) -> float:
    """What ``count`` steps take, from barrier to barrier."""
    dist.barrier()
    start = time.perf_counter()
    for _ in range(count):
        step()
    dist.barrier()
    return time.perf_counter() - start


def steps_in(step: Step, window: float) -> int:
    """How many steps take about ``window`` seconds; the same number in every process."""
    seconds(step, 2)
    first = torch.tensor(seconds(step, 2) / 2)
    dist.broadcast(first, 0)
    trial = max(2, min(10, int(window / float(first))))
    count = torch.tensor(max(2.0, window * trial / seconds(step, trial)))
    dist.broadcast(count, 0)
    return int(count)
