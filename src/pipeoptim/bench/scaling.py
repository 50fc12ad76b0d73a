"""How the cost of a mini-batch grows with depth, tensors, weights, M and the length of the run, compared with training without a pipeline.

All stages run in this process, so that nothing but the engine's own work is added to that of torch. The plain loop trains the
same modules with as many micro-batches and the same optimizers; both take turns. The long run is one of two processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage

from pipeoptim.bench.checks import runnable
from pipeoptim.bench.live import resident_bytes, tensors_alive
from pipeoptim.bench.processes import run_on_processes
from pipeoptim.bench.record import Record, ResultRow
from pipeoptim.engine import Emulator, Schedule
from pipeoptim.errors import ConfigError

WINDOWS = 10
_LOSS = nn.functional.mse_loss


@dataclass(frozen=True)
class Size:
    """One pipeline: ``layers`` of Linear(width, width) on each of ``depth`` stages, ``m`` micro-batches of 8 rows."""

    depth: int = 4
    layers: int = 2
    width: int = 32
    m: int = 1


GROWTH = {
    "D": [Size(depth=d) for d in (1, 2, 4, 8, 16)],
    "tensors": [Size(layers=n) for n in (1, 4, 16, 64)],
    "weights": [Size(width=w) for w in (32, 128, 512)],
    "M": [Size(m=m) for m in (1, 2, 4, 8, 16)],
}


def measure(method: str = "pipeoptim", updates: int = 10_000, repeats: int = 5, steps: int = 30) -> Record:
    """Measure growth in four directions, and a long run.

    Args:
        method: a name in ``METHODS``.
        updates: length of the long run, a multiple of 10; 0 for none.
        repeats, steps: turns of each contender, and mini-batches per turn.

    Raises:
        ConfigError: ``updates`` is not such a number.
    """
    if updates < 0 or updates % WINDOWS:
        raise ConfigError(f"updates is {updates}, must be a multiple of {WINDOWS}")
    runnable([method], [2], [1])
    rows = []
    for what, sizes in GROWTH.items():
        for size in sizes:
            rows += _pair(what, size, method, repeats, steps)
    if updates:
        timeout = 120 + updates * 0.2
        found = run_on_processes("pipeoptim.bench.scaling:long_run", {"method": method, "updates": updates}, 2, 1, timeout)
        rows += [ResultRow(**row) for each in found for row in each]
    return Record("scaling", "ms", {"method": method, "updates": updates, "repeats": repeats, "steps": steps}, rows)


def _pair(what: str, size: Size, method: str, repeats: int, steps: int) -> list[ResultRow]:
    contenders = {"pipeline": _pipeline(size, method), "plain": _plain(size)}
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, step in contenders.items():
            start = time.perf_counter()
            for _ in range(steps):
                step()
            if turn:  # the first warms up
                samples[name].append((time.perf_counter() - start) / steps * 1e3)
    weights = size.depth * size.layers * (size.width**2 + size.width)
    shared = {"grows": what, "D": size.depth, "M": size.m, "tensors": 2 * size.layers * size.depth, "weights": weights}
    value = shared[what]
    return [ResultRow(f"{what} {value}, {name}", samples[name], {**shared, "contender": name}) for name in contenders]


def _stages(size: Size) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(*(nn.Linear(size.width, size.width) for _ in range(size.layers))) for _ in range(size.depth)]


def _pipeline(size: Size, method: str) -> Callable[[], object]:
    pipe = Emulator(_stages(size), _adam, _LOSS, method, size.m)
    x, y = torch.randn(8 * size.m, size.width), torch.randn(8 * size.m, size.width)
    return lambda: pipe.step(x, target=y)


def _plain(size: Size) -> Callable[[], object]:
    stages = _stages(size)
    model, optimizers = nn.Sequential(*stages), [_adam(stage.parameters()) for stage in stages]
    x, y = torch.randn(8 * size.m, size.width), torch.randn(8 * size.m, size.width)

    def step() -> None:
        for rows, target in zip(x.chunk(size.m), y.chunk(size.m), strict=True):
            (_LOSS(model(rows), target) / size.m).backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


def _adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4)


def long_run(method: str, updates: int) -> list[dict[str, Any]]:
    """The part of one process: a row with the time per update in each tenth of the run, and memory at the ends."""
    k, size = dist.get_rank(), Size(depth=2)
    module = _stages(size)[k]
    pipe = Schedule(PipelineStage(module, k, 2, torch.device("cpu")), _adam(module.parameters()), _LOSS, method)
    x, y = torch.randn(8, size.width), torch.randn(8, size.width)
    args, target = ((x,) if k == 0 else ()), (y if k == 1 else None)
    samples, memory, tensors = [], [], []
    for _ in range(WINDOWS):
        dist.barrier()
        start = time.perf_counter()
        for _ in range(updates // WINDOWS):
            pipe.step(*args, target=target)
        samples.append((time.perf_counter() - start) / (updates // WINDOWS) * 1e3)
        memory.append(resident_bytes())
        tensors.append(tensors_alive())
    pipe.drain()
    pipe.close()
    settings = {"grows": "updates", "stage": k, "updates": updates, "resident_bytes": memory, "tensors_alive": tensors}
    return [{"name": f"{updates} updates, stage {k}", "samples": samples, "settings": settings}]


def columns(record: Record) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: each size beside the plain loop; what a stage and micro-batch cost more; then the long run."""
    head = ["grows", "size", "pipeline, ms", "plain, ms", "times", "added per stage and micro-batch, ms"]
    body = []
    rows = {row.name: row for row in record.rows}
    for row in record.rows:
        s = row.settings
        if s.get("contender") == "pipeline":
            plain = rows[row.name.replace("pipeline", "plain")]
            added = (row.median - plain.median) / s["D"] / s["M"]
            cells = [s["grows"], f"{s[s['grows']]:,}", f"{row.median:.3g}", f"{plain.median:.3g}"]
            body.append([*cells, f"{row.median / plain.median:.2f}", f"{added:.3g}"])
    return head, body


def long_columns(record: Record) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the long run: a line per stage."""
    head = ["stage", "updates", "ms per update, first tenth", "last tenth", "median of all tenths"]
    head += ["MB resident after the first tenth", "the second", "the last", "tensors alive after the first tenth", "the last"]
    body = []
    for row in record.rows:
        s = row.settings
        if s["grows"] == "updates":
            cells = [
                str(s["stage"]),
                f"{s['updates']:,}",
                f"{row.samples[0]:.3g}",
                f"{row.samples[-1]:.3g}",
                f"{row.median:.3g}",
            ]
            cells += [f"{s['resident_bytes'][n] / 1e6:.1f}" for n in (0, 1, -1)]
            body.append(cells + [f"{s['tensors_alive'][n]:,}" for n in (0, -1)])
    return head, body
