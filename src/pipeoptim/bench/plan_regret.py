"""What a plan loses: the way that ``pipeoptim plan`` chooses, beside the best of all that are measured.

Two stages of a model with uneven blocks, under every cut, number of micro-batches and method that the plan could choose from. The plan is
made, and written, before anything is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist

from pipeoptim.bench import simulated
from pipeoptim.bench.link_profile import LinkMeasurement
from pipeoptim.bench.processes import run_on_processes
from pipeoptim.bench.record import Record
from pipeoptim.methods import get_method
from pipeoptim.simulate import Profile
from pipeoptim.simulate.cluster import Cluster, ClusterLevel
from pipeoptim.simulate.plan_search import Candidate, PlanRequest, find_plans

METHODS, MICROBATCHES = ("gpipe", "1f1b", "pipeoptim"), (1, 4)


@dataclass(frozen=True)
class CutRun:
    """Two stages on devices of fixed speed.

    Attributes:
        milliseconds: of F and B of a mini-batch, of each block.
        method, m: of the pipeline.
        lengths: blocks of each stage.
        steps: mini-batches.
    """

    milliseconds: tuple[float, ...]
    method: str
    m: int
    lengths: tuple[int, int]
    steps: int = 18

    def measure(self) -> float:
        """Mini-batches per second of stage 0 between a third of its updates before the drain and the last of them."""
        first = self.lengths[0]
        seconds = [sum(self.milliseconds[:first]), sum(self.milliseconds[first:])]
        options = {"method": self.method, "m": self.m, "milliseconds": seconds, "steps": self.steps}
        ends = run_on_processes("pipeoptim.bench.plan_regret:stage", options, 2, threads=1, timeout=600)[0]
        return simulated.steady_rate(ends, get_method(self.method).program(2, self.m))


def stage(method: str, m: int, milliseconds: Sequence[float], steps: int) -> list[float]:
    """The part of one process."""
    return simulated.stage(method, 2, m, 0.0, milliseconds[dist.get_rank()], 1.0, 0.0, steps)


def uneven_profile(milliseconds: Sequence[float], link: LinkMeasurement) -> Profile:
    """Of blocks on a device of fixed speed."""
    found = simulated.device_profile(1.0, len(milliseconds), link)  # a second each
    blocks = tuple(
        replace(
            block,
            forward=tuple(own / 1e3 * one for one in block.forward),
            backward=tuple(own / 1e3 * one for one in block.backward),
        )
        for block, own in zip(found.blocks, milliseconds, strict=True)
    )
    return replace(found, blocks=blocks)


def planned(profile: Profile) -> Candidate:
    """What the search of ``pipeoptim plan --objective time --devices 2 --stages 2`` chooses."""
    methods = [get_method(name) for name in METHODS]
    cluster = Cluster((ClusterLevel(2, profile.link.latency, profile.link.bandwidth or float("inf")),), (1.0, 1.0))
    request = PlanRequest(profile, cluster, methods, MICROBATCHES, slacks=(0.0,), recompute=("",), stages=(2,))
    return find_plans(request).best.candidate


def columns(record: Record) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: a line per model."""
    body = []
    for model in dict.fromkeys(row.settings["model"] for row in record.rows):
        rows = [row for row in record.rows if row.settings["model"] == model]
        best, chosen = max(rows, key=lambda row: row.median), next(row for row in rows if row.settings["planned"])
        cells = [_way(chosen.settings), f"{chosen.median:.4g}", _way(best.settings), f"{best.median:.4g}"]
        body.append([model, str(len(rows)), *cells, f"{best.median / chosen.median - 1:.1%}"])
    return ["model", "ways", "planned", "mini-batches/s", "best measured", "mini-batches/s", "best over planned"], body


def _way(settings: dict[str, Any]) -> str:
    return f"{settings['method']}, M = {settings['m']}, cut {','.join(map(str, settings['lengths']))}"
