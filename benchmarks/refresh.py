"""What predictions from the mini-batch in progress cost, by how often they are made anew.

``python benchmarks/refresh.py`` writes ``benchmarks/results/refresh.json``: the throughput of a GPT at M = D relative to one prediction per
update by the last momentum (``refined``). A pipeline of equal devices is as fast as its slowest stage, so each stage is measured, in
processor time, by itself, as on a device of its own. With ``--together`` also with all others in one process, where all of them share its
caches. The pipelines take turns. On a quiet machine it takes some two minutes, with ``--together`` twice as long.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pipeoptim as po
from pipeoptim.bench.models import Workload, best_cut, block_seconds
from pipeoptim.bench.record import Record, ResultRow
from pipeoptim_zoo.speed import gpt

BY_ITSELF, TOGETHER = "each stage by itself", "all stages in one process"


class HandOn(nn.Module):
    """In place of a stage that is not measured: one weight, so that a gradient comes back through it."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """Next to no work."""
        return x * self.factor


class TimedStages:
    """An emulator with a clock for each of some stages; the other stages only hand on what they get."""

    def __init__(self, work: Workload, lengths: Sequence[int], measured: Sequence[int], **options: Any) -> None:
        ends = [sum(lengths[: k + 1]) for k in range(len(lengths))]
        stages = [work.join(*work.blocks[end - n : end]) for n, end in zip(lengths, ends, strict=True)]
        self.x, self.y, loss_fn = work.x, work.y, work.loss_fn
        with torch.no_grad():
            for stage in stages[: measured[0]]:  # what the first measured stage gets
                self.x = stage(self.x)
        if len(stages) - 1 not in measured:
            loss_fn = lambda out, _: out.square().mean()  # noqa: E731
        stages = [stage if k in measured else HandOn() for k, stage in enumerate(stages)]
        make = lambda params: torch.optim.AdamW(params, lr=1e-4)  # noqa: E731
        self.pipe = po.Emulator(stages, make, loss_fn, "pipeoptim", len(lengths), **options)
        self.seconds = dict.fromkeys(measured, 0.0)
        for k in measured:
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
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        for _ in range(steps):
            self.pipe.step(self.x, target=self.y)
        return max(self.seconds.values()) / steps


def measure(depth: int, batch: int, how: str, repeats: int, steps: int) -> list[ResultRow]:
    """One row per refresh; M = D."""
    costs = block_seconds(gpt(batch))
    lengths = best_cut(len(costs), depth, lambda _, start, end: sum(costs[start:end]))
    refreshes = [r for r in (1, 2, 4, 8) if r <= depth]
    settings: dict[int, dict[str, Any]] = {0: {}, **{r: {"prediction": "in_progress", "refresh": r} for r in refreshes}}
    groups = [[k] for k in range(depth)] if how == BY_ITSELF else [list(range(depth))]

    def made(measured: list[int], options: dict[str, Any]) -> TimedStages:
        torch.manual_seed(0)
        return TimedStages(gpt(batch), lengths, measured, **options)

    pipes = [{r: made(measured, options) for r, options in settings.items()} for measured in groups]
    samples: dict[int, list[float]] = {r: [] for r in refreshes}
    for turn in range(repeats + 1):
        # Those that are compared run one right after the other: the machine's speed changes by the minute.
        seconds = [{r: pipe.slowest(steps) for r, pipe in same_stages.items()} for same_stages in pipes]
        for r in refreshes if turn else ():  # the first turn warms up
            samples[r].append(max(one[0] for one in seconds) / max(one[r] for one in seconds))
    name = f"{how}: D = M = {depth}, {batch // depth} x 64 tokens per micro-batch, refresh"
    told = {"depth": depth, "batch": batch, "measured": how}
    return [ResultRow(f"{name} {r}", samples[r], {**told, "refresh": r}) for r in refreshes]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--together", action="store_true", help="measure the stages also with all of them in one process")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/refresh.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    ways = (BY_ITSELF, TOGETHER) if options.together else (BY_ITSELF,)
    cases = [(d, b, how) for how in ways for d in options.depths for b in options.batches]
    found = [row for case in cases for row in measure(*case, options.repeats, options.steps)]
    record = Record("refresh", "throughput", {"model": "gpt", "optimizer": "AdamW", "threads": 1}, found)
    print(f"written to {record.write(options.out)}")
    for row in found:
        print(f"{row.name:70} {row.median:.3f}: it costs {1 - row.median:.1%} of throughput")
