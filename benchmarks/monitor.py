"""What measuring the prediction error costs: its time beside that of updates and of whole steps, its memory beside the weights.

``python benchmarks/monitor.py`` writes ``benchmarks/results/monitor.json``. Per measurement the monitor takes three small samples
of a stage's weights: latest, predicted, and those that came.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipeoptim.bench.predict import shapes
from pipeoptim.bench.record import Record, ResultRow
from pipeoptim.engine.stage.prediction_monitor import SELDOM, PredictionMonitor
from pipeoptim.rules import Predictor
from pipeoptim.train.engines import make_emulator
from pipeoptim.train.recipes import get_recipe
from pipeoptim.train.setup import build_setup
from pipeoptim.weights import StorageLayout

STEPS = 3


def beside_updates(weights: float, blocks: int) -> list[ResultRow]:
    """The monitor at every version, and as often as it looks by default, beside AdamW's step with its prediction."""
    params = [torch.nn.Parameter(torch.empty(shape).normal_(0, 0.02)) for shape in shapes(int(weights))]
    for p in params:
        p.grad = torch.empty_like(p).normal_(0, 0.02)
    optimizer = torch.optim.AdamW(params, fused=True)
    optimizer.step()
    out = StorageLayout(params).copy().tensors
    predictor, total = Predictor(optimizer), sum(p.numel() for p in params)
    rows = []
    default = PredictionMonitor([params], 0).every
    for every in sorted({1, default}):
        monitor, shares, update_ms = PredictionMonitor([params], 0, every), [], 0.0
        for block in range(blocks + 1):
            updating = measuring = 0.0
            for version in range(block * every, (block + 1) * every):
                began = time.perf_counter()
                if not predictor.fused_step(out, STEPS):
                    optimizer.step()
                    predictor.predict_into(out, STEPS)
                middle = time.perf_counter()
                monitor.updated(version, params)
                monitor.predicted(version, STEPS, params, out)
                updating, measuring = updating + middle - began, measuring + time.perf_counter() - middle
            if block >= STEPS:  # by then there is something to compare
                shares.append(100 * measuring / updating)
                update_ms = 1e3 * updating / every
        settings = {"weights": total, "update_ms": update_ms, "every": every, "what": "time"}
        by_default = ", the default" if every == default else ""
        often = "every version" if every == 1 else f"every {every} versions"
        rows.append(
            ResultRow(f"{total / 1e6:.0f} million weights, {often}{by_default}: % of the update's time", shares, settings)
        )
    share = 100 * _bytes(monitor) / (2 * 4 * total)
    name = f"{total / 1e6:.0f} million weights: % of the memory of both copies of the weights"
    return [*rows, ResultRow(name, [share], {"weights": total, "what": "memory"})]


def _bytes(monitor: PredictionMonitor) -> int:
    """What a monitor keeps: its coordinates, and samples of all predictions that can wait for their version."""
    own = [where for _, where in monitor._places] + monitor._sampler._runs
    sample = 4 * sum(where.numel() for _, where in monitor._places)
    return sum(t.numel() * t.element_size() for t in own) + 2 * (STEPS + 1) * sample


def beside_steps(steps: int) -> list[ResultRow]:
    """The monitors of all stages of the default recipe, beside whole steps of their emulator."""
    rows = []
    for every in (SELDOM, 1):
        config = replace(get_recipe("chars"), monitor_every=every)
        setup = build_setup(config)
        pipe, _ = make_emulator(setup, setup.task.loss)
        clock = [0.0]
        for k in range(config.stages):
            if (monitor := pipe._worker(k).monitor) is not None:
                for name in ("predicted", "updated"):
                    setattr(monitor, name, _timed(getattr(monitor, name), clock))
        shares = []
        for step in range(steps):
            x, y = setup.task.train_batch(step, config.batch_size)
            clock[0] = 0.0
            began = time.perf_counter()
            pipe.step(x, target=y)
            shares.append(100 * clock[0] / (time.perf_counter() - began))
        mean = [sum(shares[i : i + 10]) / 10 for i in range(10, steps, 10)]
        often = "every version" if every == 1 else f"every {every} versions, the default"
        settings = {"recipe": "chars", "every": every, "what": "step"}
        rows.append(ResultRow(f"recipe chars, {config.stages} stages, {often}: % of a step's time", mean, settings))
    return rows


def _timed(work: Callable[..., Any], clock: list[float]) -> Callable[..., Any]:
    def timed(*args: Any) -> None:
        began = time.perf_counter()
        work(*args)
        clock[0] += time.perf_counter() - began

    return timed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--weights", type=float, nargs="+", default=[100e6, 25e6])
    parser.add_argument("--blocks", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/monitor.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = [row for weights in options.weights for row in beside_updates(weights, options.blocks)] + beside_steps(60)
    record = Record("monitor", "%", {"steps": STEPS, "threads": 1}, found)
    print(f"written to {record.write(options.out)}")
    for row in found:
        print(f"{row.name:80} {row.median:.3f} %")
