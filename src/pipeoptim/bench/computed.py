"""Simulated beside measured, on models that are really computed: throughput of one process and core per stage, and peak bytes.

The profile of a model is that of ``pipeoptim profile``, by its own code, but measured as the run will compute: two processes, each kept on
its core, profile the same model at once, since cores share caches, memory bandwidth and clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage

from pipeoptim.bench.efficiency import stay_on_a_core
from pipeoptim.bench.link_profile import LinkMeasurement
from pipeoptim.bench.live import LiveStorages
from pipeoptim.bench.measured_model import MeasuredModel
from pipeoptim.bench.memory import StageWatch
from pipeoptim.bench.model_profile import measure_profile, measured_bytes
from pipeoptim.bench.models import build, short_name
from pipeoptim.bench.processes import run_on_processes
from pipeoptim.bench.record import Record
from pipeoptim.engine import Emulator, Schedule
from pipeoptim.errors import bytes_in_words
from pipeoptim.kernels.allocation import keep_freed_memory
from pipeoptim.methods import get_method
from pipeoptim.simulate import Profile, Scenario, Simulation, even_cut, simulate
from pipeoptim.simulate.profile import profile_of

WARM_UP, WINDOW = 5, 5
"""Mini-batches before anything is timed, and of a window; the median of the windows counts."""

STEPS = 25
"""Mini-batches that are timed."""


@dataclass(frozen=True)
class ComputedRun:
    """A run that is predicted, then measured.

    Attributes:
        model: a key of :data:`~pipeoptim.bench.models.MODELS`, or module:function.
        batch: rows of a mini-batch.
        method, m: of the pipeline.
        lengths: blocks of each stage.
        steps: mini-batches that are timed.
    """

    model: str
    batch: int
    method: str
    m: int
    lengths: tuple[int, ...]
    steps: int = STEPS

    @property
    def name(self) -> str:
        """What tells it from others."""
        return f"{short_name(self.model)} {self.method} D={len(self.lengths)} M={self.m}"

    def predict(self, profile: Profile) -> Simulation:
        """The simulation."""
        method = get_method(self.method)
        program = method.program(len(self.lengths), self.m)
        return simulate(Scenario(profile, tuple(self.lengths), method, program, WARM_UP + self.steps))

    def measure(self) -> float:
        """Mini-batches per second of stage 0 in the steady state."""
        options = {**vars(self), "lengths": list(self.lengths)}
        ends = run_on_processes("pipeoptim.bench.computed:stage", options, len(self.lengths), threads=1, timeout=600)[0]
        windows = [ends[n + WINDOW] - ends[n] for n in range(WARM_UP - 1, len(ends) - WINDOW, WINDOW)]
        return WINDOW / float(median(windows))

    def peaks(self) -> list[int]:
        """Of each stage the most bytes at the end of an action, as the memory benchmark finds them by watching live storages."""
        work = build(self.model, self.batch)
        ends = [0, *accumulate(self.lengths)]
        stages = [work.join(*work.blocks[start:end]) for start, end in pairwise(ends)]
        pipe = Emulator(stages, adamw, work.loss_fn, self.method, self.m)
        with LiveStorages() as live:
            watches = [StageWatch(live, pipe._worker(k), [work.x, work.y]) for k in range(len(stages))]
            # The very first shows whether modules change their inputs, which takes a copy.
            for minibatches in (1, pipe.program.warm_up + 3):
                for watch in watches:
                    watch.total = 0
                for _ in range(minibatches):
                    pipe.step(work.x, target=work.y)
                pipe.drain()
        return [watch.total for watch in watches]


def memory_columns(record: Record) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: a line per model, with the errors of its stages' peak bytes."""
    body = []
    for model in dict.fromkeys(row.settings["model"] for row in record.rows):
        rows = [row for row in record.rows if row.settings["model"] == model]
        errors = sorted(abs(row.settings["simulated"] / row.median - 1) for row in rows)
        sizes = sorted(row.median for row in rows)
        spread = f"{bytes_in_words(sizes[0])} .. {bytes_in_words(sizes[-1])}"
        body.append([short_name(model), str(len(rows)), spread, f"{median(errors):.2%}", f"{errors[-1]:.2%}"])
    return ["model", "stages of runs", "measured peaks", "median error", "worst"], body


def best_lengths(profile: Profile, depth: int, m: int) -> tuple[int, ...]:
    """The cut whose slowest stage is the fastest."""
    return even_cut(profile, depth, profile.batch_rows // m)


def counted_profile(model: str, batch: int, microbatches: Sequence[int]) -> Profile:
    """Of ``model``, with bytes and without seconds."""
    return measured_bytes(_work(model, batch), microbatches)


def busy_profile(model: str, batch: int, microbatches: Sequence[int], repeats: int, link: LinkMeasurement) -> Profile:
    """Of ``model``, while each of two cores computes the same."""
    options = {"model": model, "batch": batch, "microbatches": list(microbatches), "repeats": repeats, "link": list(link)}
    found = run_on_processes("pipeoptim.bench.computed:profiled", options, 2, threads=1, timeout=1800)
    return profile_of(found[0])


def profiled(model: str, batch: int, microbatches: Sequence[int], repeats: int, link: Sequence[Any]) -> dict[str, Any]:
    """The part of one process: the profile as plain data."""
    _as_a_stage()
    work = _work(model, batch)
    dist.barrier()
    return measure_profile(work, microbatches, repeats, LinkMeasurement(*link)).to_dict()


def _work(model: str, batch: int) -> MeasuredModel:
    work = build(model, batch)
    return MeasuredModel(
        short_name(model), work.join(*work.blocks), (work.x,), batch, adamw, work.loss_fn, work.y, how="blocks"
    )


def stage(model: str, batch: int, method: str, m: int, lengths: Sequence[int], steps: int) -> list[float]:
    """The part of one process: when each of its steps ended."""
    _as_a_stage()
    k, depth = dist.get_rank(), len(lengths)
    work = build(model, batch)
    first = sum(lengths[:k])
    module = work.join(*work.blocks[first : first + lengths[k]])
    place = PipelineStage(module, k, depth, torch.device("cpu"))
    pipe = Schedule(place, adamw(module.parameters()), work.loss_fn, method, m, liveness_timeout=None)
    args, target = ((work.x,) if k == 0 else ()), (work.y if k == depth - 1 else None)
    ends = []
    for _ in range(WARM_UP + steps):
        pipe.step(*args, target=target)
        ends.append(perf_counter())
    pipe.drain()
    return ends


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """What trains them."""
    return torch.optim.AdamW(parameters, lr=1e-4)


def _as_a_stage() -> None:
    """As a process of a training run, on a core of its own."""
    stay_on_a_core()
    keep_freed_memory()
