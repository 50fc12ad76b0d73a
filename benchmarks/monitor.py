"""What measuring the prediction error costs: its time beside the update of a stage, its memory beside the stage's weights.

``python benchmarks/monitor.py`` writes ``benchmarks/results/monitor.json``. Per update the monitor takes three small samples of
a stage's weights (latest, predicted, and those that came), here at every version.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from pipeoptim.bench.predict import shapes
from pipeoptim.bench.record import Record, Row
from pipeoptim.engine.monitor import PredictionMonitor
from pipeoptim.rules import Predictor
from pipeoptim.weights import StorageLayout


def sampled_bytes(monitor: PredictionMonitor, held: list[Any]) -> int:
    """What a monitor keeps: its coordinates, and the samples of predictions that wait for their version."""
    own = [where for sample in monitor._samples for _, where in sample]
    return sum(t.numel() * t.element_size() for t in [*own, *held])


def measure(weights: float, repeats: int, steps: int = 3) -> list[Row]:
    """Rows of the update alone, and of the monitor with predictions ``steps`` ahead, in turns."""
    params = [torch.nn.Parameter(torch.empty(shape).normal_(0, 0.02)) for shape in shapes(int(weights))]
    for p in params:
        p.grad = torch.empty_like(p).normal_(0, 0.02)
    optimizer = torch.optim.AdamW(params, fused=True)
    optimizer.step()
    out = StorageLayout(params).copy().tensors
    predictor, monitor = Predictor(optimizer), PredictionMonitor([params], 0)
    updates, measuring = [], []
    for version in range(repeats + steps):
        began = time.perf_counter()
        if not predictor.fused_step(out, steps):
            optimizer.step()
            predictor.predict_into(out, steps)
        middle = time.perf_counter()
        monitor.updated(version, params)
        monitor.predicted(version, steps, params, out)
        ended = time.perf_counter()
        if version >= steps:
            updates.append(1e3 * (middle - began))
            measuring.append(1e3 * (ended - middle))
    pending = [t for pair in monitor._pending.values() for part in pair for t in part]
    total = sum(p.numel() for p in params)
    share = sampled_bytes(monitor, pending) / (2 * 4 * total)
    ratios = [100 * m / u for m, u in zip(measuring, updates, strict=True)]
    name = f"{total / 1e6:.0f} million weights, "
    settings = {"weights": total, "update_ms": sorted(updates)[len(updates) // 2]}
    return [
        Row(name + "time, share of step and prediction (AdamW)", ratios, {**settings, "what": "time"}),
        Row(name + "memory, share of both copies of the weights", [100 * share], {**settings, "what": "memory"}),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--weights", type=float, nargs="+", default=[100e6, 25e6])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/monitor.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = [row for weights in options.weights for row in measure(weights, options.repeats)]
    record = Record("monitor", "% of the update", {"every": 1, "steps": 3, "threads": 1}, found)
    print(f"written to {record.write(options.out)}")
    for row in found:
        print(f"{row.name:70} {row.median:.3f} %")
