"""What predictions from the mini-batch in progress cost, by how often they are made anew.

``python benchmarks/refresh.py`` writes ``benchmarks/results/refresh.json``: the throughput of a GPT at M = D relative to one prediction per
update by the last momentum (``refined``). All stages run in one process, each with a clock of its own, which counts processor time; a
pipeline of equal devices is as fast as its slowest stage, so the slowest clock is what counts. The pipelines take turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import pipeoptim as po
from pipeoptim.bench.models import Workload, best_cut, block_seconds
from pipeoptim.bench.record import Record, ResultRow
from pipeoptim_zoo.speed import gpt


class TimedPipeline:
    """An emulator whose stages have a clock each."""

    def __init__(self, work: Callable[[], Workload], lengths: list[int], m: int, **options: Any) -> None:
        torch.manual_seed(0)
        self.work, depth = work(), len(lengths)
        ends = [sum(lengths[: k + 1]) for k in range(depth)]
        stages = [self.work.join(*self.work.blocks[end - n : end]) for n, end in zip(lengths, ends, strict=True)]
        make = lambda params: torch.optim.AdamW(params, lr=1e-4)  # noqa: E731
        self.pipe = po.Emulator(stages, make, self.work.loss_fn, "pipeoptim", m, **options)
        self.seconds = [0.0] * depth
        for k in range(depth):
            runner: Any = self.pipe._runners[k]
            runner.run = self._timed(k, runner.run)

    def _timed(self, k: int, run: Callable[..., None]) -> Callable[..., None]:
        def timed(*args: Any) -> None:
            began = time.process_time()
            run(*args)
            self.seconds[k] += time.process_time() - began

        return timed

    def slowest(self, steps: int) -> float:
        """Seconds per mini-batch of the slowest stage."""
        self.seconds[:] = [0.0] * len(self.seconds)
        for _ in range(steps):
            self.pipe.step(self.work.x, target=self.work.y)
        return max(self.seconds) / steps


def measure(depth: int, batch: int, repeats: int, steps: int) -> list[ResultRow]:
    """One row per refresh; M = D."""
    work = lambda: gpt(batch)  # noqa: E731
    costs = block_seconds(work())
    lengths = best_cut(len(costs), depth, lambda _, start, end: sum(costs[start:end]))
    refreshes = [r for r in (1, 2, 4, 8) if r <= depth]
    pipes = {0: TimedPipeline(work, lengths, depth)}
    pipes |= {r: TimedPipeline(work, lengths, depth, prediction="in_progress", refresh=r) for r in refreshes}
    samples: dict[int, list[float]] = {r: [] for r in refreshes}
    for turn in range(repeats + 1):
        seconds = {r: pipe.slowest(steps) for r, pipe in pipes.items()}
        for r in refreshes if turn else ():  # the first turn warms up
            samples[r].append(seconds[0] / seconds[r])
    return [
        ResultRow(
            f"D = M = {depth}, {batch // depth} x 64 tokens per micro-batch, refresh {r}",
            samples[r],
            {"depth": depth, "batch": batch, "refresh": r},
        )
        for r in refreshes
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/refresh.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = [row for d in options.depths for b in options.batches for row in measure(d, b, options.repeats, options.steps)]
    record = Record("refresh", "throughput", {"model": "gpt", "optimizer": "AdamW", "threads": 1}, found)
    print(f"written to {record.write(options.out)}")
    for row in found:
        print(f"{row.name:70} {row.median:.3f}")
