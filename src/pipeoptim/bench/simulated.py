"""Simulated throughput beside measured: predictions are written to a file before anything of them is measured.

A run trains through ``Schedule`` in one process per stage. Its stages are devices of fixed speed (see :mod:`.efficiency`), whose seconds
the profile has by construction. Stage 0 notes when each of its steps ends; simulated and measured throughput are taken over the same
steps. No barrier lies between them: the stages drift apart as in training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import median
from time import perf_counter

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage

from pipeoptim.bench.efficiency import BATCH, Device, WaitingStage, stay_on_a_core
from pipeoptim.bench.link_profile import LinkMeasurement
from pipeoptim.bench.processes import run_on_processes
from pipeoptim.bench.record import Record, ResultRow
from pipeoptim.engine import Schedule
from pipeoptim.methods import get_method
from pipeoptim.schedule import Program
from pipeoptim.simulate import Conditions, Profile, Scenario, Simulation, simulate
from pipeoptim.simulate.profile import BlockProfile, LinkProfile, OptimizerProfile, PassCost

WIDTH = 64


@dataclass(frozen=True)
class SimulatedRun:
    """A run that is predicted, then measured.

    Attributes:
        method, depth, m, slack: of the pipeline.
        milliseconds: of F and B of a mini-batch on a device of fixed speed (F a third of it).
        straggler: how many times as long the middle stage takes.
        delay: milliseconds that a message is late.
        jitter: sigma of a log-normal factor on each F and B.
        steps: mini-batches.
    """

    method: str
    depth: int
    m: int = 1
    slack: float = 0.0
    milliseconds: float = 600.0
    straggler: float = 1.0
    delay: float = 0.0
    jitter: float = 0.0
    steps: int = 30

    @property
    def name(self) -> str:
        """What tells it from others."""
        parts = [f"{self.method} D={self.depth} M={self.m}, {self.milliseconds:g} ms"]
        parts += [f"slack {self.slack:g}"] if self.slack else []
        parts += [f"middle stage x{self.straggler:g}"] if self.straggler != 1 else []
        parts += [f"delay {self.delay:g} ms"] if self.delay else []
        parts += [f"jitter {self.jitter:g}"] if self.jitter else []
        return ", ".join(parts)

    def predict(self, link: LinkMeasurement) -> Simulation:
        """The simulation, with messages and the engine's own work as measured on this machine."""
        profile = device_profile(self.milliseconds / 1e3, self.depth, link)
        method = get_method(self.method)
        stragglers = {self.depth // 2: self.straggler} if self.straggler != 1 else {}
        conditions = Conditions(
            delay=link.latency + self.delay / 1e3, jitter=self.jitter, stragglers=stragglers, draws=20 if self.jitter else 1
        )
        program = method.program(self.depth, self.m, slack=self.slack)
        return simulate(Scenario(profile, (1,) * self.depth, method, program, self.steps, conditions=conditions))

    def measure(self) -> float:
        """Mini-batches per second of stage 0 between a third of its updates before the drain and the last of them."""
        options = {name: value for name, value in vars(self).items() if name != "delay"}
        timeout = 300 + 10 * self.steps * self.milliseconds / 1e3 * self.depth
        ends: list[float] = run_on_processes(
            "pipeoptim.bench.simulated:stage", options, self.depth, threads=1, timeout=timeout, delay=self.delay / 1e3
        )[0]
        return steady_rate(ends, get_method(self.method).program(self.depth, self.m, slack=self.slack))


def steady_rate(ends: list[float], program: Program) -> float:
    """Mini-batches per second from the ends of the steps of stage 0, the first third of those that end with an update left out."""
    first_update = next(n for n in range(len(ends)) if any(action.kind.value == "U" for action in program.step(0, n)))
    fed = ends[first_update:]
    first, last = len(fed) // 3, len(fed) - 1
    return (last - first) / (fed[last] - fed[first])


def device_profile(seconds: float, depth: int, link: LinkMeasurement) -> Profile:
    """Of :class:`~pipeoptim.bench.efficiency.WaitingStage` on devices of fixed speed, with messages as measured."""
    rows = (1, BATCH)
    forward = tuple(seconds / 3 * r / BATCH for r in rows)
    size = tuple(4.0 * WIDTH * r for r in rows)
    block = BlockProfile("stage", forward, tuple(2 * f for f in forward), size, size, size, (0.0, 0.0), 4 * WIDTH * (WIDTH + 1))
    free = PassCost(0.0, 0.0)  # what a step of so few weights takes is in the measurement of the link
    own = link.per_microbatch / 2
    return Profile(
        model="devices of fixed speed",
        synthetic=False,
        batch_rows=BATCH,
        rows=rows,
        blocks=tuple(replace(block, name=f"stage {k}") for k in range(depth)),
        optimizer=OptimizerProfile("AdamW", free, free, free, 2.0),
        link=LinkProfile(link.latency, link.bandwidth, link.handling),
        action={"F": own, "B": own, "U": link.per_minibatch},
    )


def stage(
    method: str, depth: int, m: int, slack: float, milliseconds: float, straggler: float, jitter: float, steps: int
) -> list[float]:
    """The part of one process: when each of its steps ended."""
    k = dist.get_rank()
    stay_on_a_core()
    factor = straggler if k == depth // 2 else 1.0
    module = WaitingStage(Device(milliseconds / 3000 * factor, jitter, seed=k), WIDTH)
    place = PipelineStage(module, k, depth, torch.device("cpu"))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    pipe = Schedule(place, optimizer, nn.functional.mse_loss, method, m, liveness_timeout=None, slack=slack)
    x = torch.ones(BATCH, WIDTH)
    args, target = ((x,) if k == 0 else ()), (x if k == depth - 1 else None)
    ends = []
    for _ in range(steps):
        pipe.step(*args, target=target)
        ends.append(perf_counter())
    pipe.drain()
    return ends


def columns(record: Record) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: predicted, measured, and by how much they differ; what else the machine did."""
    beside = "other cores" if "other cores" in record.rows[0].settings else "load"
    named, form = {"other cores": ("other work, cores", ".2f"), "load": ("load of the machine", ".1f")}[beside]
    head = ["run", "predicted, mini-batches/s", "measured", "error", named]
    body = []
    for row in record.rows:
        predicted, more = median(row.settings["predicted"]), row.settings[beside]
        body.append([row.name, f"{predicted:.4g}", f"{row.median:.4g}", f"{error_of(row):+.1%}", f"{more:{form}}"])
    return head, body


def error_of(row: ResultRow) -> float:
    """Of a throughput: the median over its predictions, each beside the run that was measured after it."""
    return float(median(p / measured for p, measured in zip(row.settings["predicted"], row.samples, strict=True))) - 1


def scale_columns(record: Record) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: what simulations of many stages take."""
    body = [[r.name, f"{r.median:.2f}", f"{r.settings['peak bytes'] / 2**20:.0f}"] for r in record.rows]
    return ["pipeline", "processor seconds", "peak MiB"], body


def outside_columns(record: Record) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: how wrong simulations of machines elsewhere are, on average over halves that nothing was fitted on."""
    body = []
    for row in record.rows:
        means, errors = row.settings["mean of each half"], sorted(map(abs, row.samples))
        spread = f"{min(means):.1%} .. {max(means):.1%}"
        cells = [f"{sum(means) / len(means):.1%}", spread, f"{errors[len(errors) // 2]:.1%}", f"{errors[-1]:.1%}"]
        body.append([row.name, f"{len(errors):,}", *cells, f"{row.settings['vtrain']:.1%}"])
    return ["machines", "points", "mean error", "of single halves", "median", "worst", "vTrain's own, by its paper"], body
