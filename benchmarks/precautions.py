"""What the precautions against bad data and silent corruption cost a step.

``python benchmarks/precautions.py`` trains a pipeline of two stages in one process, with each option in turns, and writes
``benchmarks/results/precautions.json``; samples are ratios to the same turn without options. What a checksum takes is added to the
time that the message takes on a link.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pipeoptim as po
from pipeoptim.bench.record import Record, ResultRow
from pipeoptim.engine.transport import message

OPTIONS: dict[str, dict[str, Any]] = {
    "no option": {},
    "clipped by the stage's norm": {"clip": 1.0},
    "clipped by AdaGC, behind its warm-up": {"clip": po.AdaGC(warmup=1)},
    "on_bad skip": {"on_bad": "skip"},
    "on_bad skip, outlier 10": {"on_bad": "skip", "outlier": 10.0},
    "audit 100": {"audit": 100},
    "audit 10": {"audit": 10},
    "audit 1": {"audit": 1},
}


def measured(width: int, layers: int, batch: int, steps: int, repeats: int) -> list[ResultRow]:
    pipes = {}
    for name, options in OPTIONS.items():
        stages = [nn.Sequential(*[part for _ in range(layers) for part in (nn.Linear(width, width), nn.Tanh())]) for _ in "ab"]
        pipes[name] = po.Emulator(stages, lambda p: torch.optim.AdamW(p, lr=1e-4), nn.functional.mse_loss, **options)
    x = torch.randn(batch, width)
    times: dict[str, list[float]] = {name: [] for name in pipes}
    for turn in range(repeats + 1):
        for name, pipe in pipes.items():
            began = time.perf_counter()
            for _ in range(steps):
                pipe.step(x, target=x)
            if turn:  # the first one warms up
                times[name].append(time.perf_counter() - began)
    none = times.pop("no option")
    return [ResultRow(name, [mine / base for mine, base in zip(own, none, strict=True)]) for name, own in times.items()]


def checksum(gigabits: int, mebibytes: int, repeats: int) -> ResultRow:
    """Made by the sender and again by the receiver, which compares them; none of it while the message travels."""
    block = torch.randint(0, 256, (mebibytes << 20,), dtype=torch.uint8)
    samples = []
    for _ in range(repeats):
        began = time.perf_counter()
        message.put_checksum(block)
        message.checksum(block)
        samples.append(1 + (time.perf_counter() - began) / (8 * block.numel() / (gigabits * 1e9)))
    return ResultRow(f"a message of {mebibytes} MiB over {gigabits} Gbit/s, with its checksum", samples)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/precautions.json"))
    parser.add_argument("--repeats", type=int, default=9)
    given = parser.parse_args()
    torch.set_num_threads(1)
    shape = {"width": 512, "layers": 4, "batch": 128}
    rows = measured(**shape, steps=20, repeats=given.repeats)
    rows += [checksum(gigabits, 4, given.repeats) for gigabits in (1, 10)]
    record = Record("precautions", "time without", {**shape, "stages": 2, "threads": 1}, rows)
    print(f"written to {record.write(given.out)}")
    for row in rows:
        print(f"{row.name:56} {row.median:.3f}")
