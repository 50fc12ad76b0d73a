"""What a plan loses beside the best way that was measured: two stages, every cut, three methods, one and four micro-batches.

python benchmarks/plan_regret.py emulated    blocks on devices of fixed speed, which wait, so that runs share the machine; 2 minutes
python benchmarks/plan_regret.py real        models that are really computed, on two cores that do nothing else; 6 minutes
python benchmarks/plan_regret.py show        the table

Each model is planned first, and the planned way is measured first. Results go to results/plan_regret.json, row by row: it may be stopped at
any time and goes on where it was.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from pipeoptim.bench.computed import ComputedRun, busy_profile
from pipeoptim.bench.link_profile import measure_link
from pipeoptim.bench.models import short_name
from pipeoptim.bench.plan_regret import METHODS, MICROBATCHES, CutRun, planned, uneven_profile
from pipeoptim.bench.record import Record, ResultRow
from pipeoptim.bench.tables import columns
from pipeoptim.simulate import Profile

FILE = Path(__file__).parent / "results/plan_regret.json"
EMULATED = {
    "six uneven blocks": (200.0, 50.0, 150.0, 250.0, 50.0, 100.0),
    "five uneven blocks": (60.0, 320.0, 100.0, 120.0, 200.0),
}
REAL = {"pipeoptim_zoo.speed:resnet26": 32, "pipeoptim_zoo.speed:gpt": 32}

Way = tuple[str, int, tuple[int, int]]
"""Method, M and cut."""


def emulated(file: Path, jobs: int, steps: int) -> None:
    """Every cut."""
    link = measure_link(4, waits=0.01)
    for name, milliseconds in EMULATED.items():
        cuts = [(n, len(milliseconds) - n) for n in range(1, len(milliseconds))]

        def measure(way: Way, milliseconds: tuple[float, ...] = milliseconds) -> float:
            method, m, lengths = way
            return CutRun(milliseconds, method, m, lengths, steps).measure()

        regret(file, name, partial(uneven_profile, milliseconds, link), lambda _, cuts=cuts: cuts, measure, jobs)


def real(file: Path, steps: int) -> None:
    """The planned cut and those a block beside it."""
    link = measure_link()
    for model, batch in REAL.items():

        def near(cut: tuple[int, int]) -> Iterable[tuple[int, int]]:
            return [(cut[0] + n, cut[1] - n) for n in (-1, 0, 1) if min(cut[0] + n, cut[1] - n) > 0]

        def measure(way: Way, model: str = model, batch: int = batch) -> float:
            method, m, lengths = way
            return ComputedRun(model, batch, method, m, lengths, steps).measure()

        profile = partial(busy_profile, model, batch, MICROBATCHES, 9, link)
        regret(file, short_name(model), profile, near, measure, jobs=1)


def regret(
    file: Path,
    model: str,
    profile: Callable[[], Profile],
    cuts: Callable[[tuple[int, int]], Iterable[tuple[int, int]]],
    measure: Callable[[Way], float],
    jobs: int,
) -> None:
    """Plan one model, if it is not planned yet, then measure all its ways that are not measured yet."""
    record = Record.read(file) if file.exists() else Record("plan regret", "mini-batches/s", {"stages": 2}, [])
    known = {row.name for row in record.rows}
    plan = next(
        (way_of(row.settings) for row in record.rows if row.settings["model"] == model and row.settings["planned"]), None
    )
    plan = plan or planned_way(profile())
    ways = [plan, *(way for way in product(METHODS, MICROBATCHES, cuts(plan[2])) if way != plan)]
    wanted = [way for way in ways if name_of(model, way) not in known]
    print(f"{model}: planned {name_of(model, plan)}; {len(wanted)} ways to measure", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        for way, rate in zip(wanted, pool.map(measure, wanted), strict=True):
            method, m, lengths = way
            own = {
                "model": model,
                "method": method,
                "m": m,
                "lengths": lengths,
                "planned": way == plan,
                "load": os.getloadavg()[0],
            }
            record.rows.append(ResultRow(name_of(model, way), [rate], own))
            record.write(file)
            print(f"{name_of(model, way)}: {rate:.4g}", flush=True)


def planned_way(profile: Profile) -> Way:
    scenario = planned(profile).scenario
    return scenario.method.name, scenario.program.microbatches, scenario.lengths


def way_of(settings: dict[str, Any]) -> Way:
    return settings["method"], settings["m"], tuple(settings["lengths"])


def name_of(model: str, way: Way) -> str:
    return f"{model}, {way[0]} M={way[1]} cut {','.join(map(str, way[2]))}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("emulated", "real", "show"))
    parser.add_argument("--jobs", type=int, default=6, help="emulated runs at a time")
    parser.add_argument("--steps", type=int, default=18, help="mini-batches of a run")
    parser.add_argument("--file", type=Path, default=FILE, help="where the results are")
    arguments = parser.parse_args()
    if arguments.what == "emulated":
        emulated(arguments.file, arguments.jobs, arguments.steps)
    elif arguments.what == "real":
        real(arguments.file, arguments.steps)
    head, body = columns(Record.read(arguments.file))
    for cells in body:
        print("; ".join(f"{name}: {cell}" for name, cell in zip(head, cells, strict=True)))


if __name__ == "__main__":
    main()
