"""``pipeoptim plan --objective``: the options of a search by simulation, and what it prints."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeoptim.cli.new_files import check_new_files
from pipeoptim.cli.simulations import chosen_profile, show_simulation
from pipeoptim.errors import ConfigError, counted
from pipeoptim.version import __version__

if TYPE_CHECKING:
    from pipeoptim.simulate import Profile, Scenario
    from pipeoptim.simulate.cluster import Cluster
    from pipeoptim.simulate.plan_search import FoundPlans, PlanKey, PlanRequest, RankedPlan

MOST_DRAWN = 32
"""Stages of a timeline that still has a reader."""


@dataclass(frozen=True)
class SearchOptions:
    """As they are on the command line."""

    objective: str | None
    profile: Path | None
    synthetic: bool
    sizes: str | None
    nodes: str
    links: str | None
    also: list[str] | None
    seconds: float | None
    out: Path | None

    def check_absent(self) -> None:
        """Raises ConfigError where one was given without --objective."""
        for one in fields(self):
            value = getattr(self, one.name)
            if value or (one.name == "seconds" and value is not None):
                raise ConfigError(f"--{one.name} belongs to a search by simulation; give --objective as well, or leave it out")


def search_plan(
    options: SearchOptions, devices: int | None, memory: list[float] | None, speeds: list[float] | None, wanted: dict[str, Any]
) -> None:
    """Search, and print the plan, its alternatives and its command line."""
    from pipeoptim.files import write_durably
    from pipeoptim.simulate.plan_search import find_plans

    if devices is None:
        raise ConfigError("--objective needs --devices: how many there are")
    check_new_files({"--out": options.out})
    profile = chosen_profile(options.profile, options.synthetic, options.sizes, devices)
    cluster = _cluster(options, profile, devices, memory, speeds or [])
    with SearchProgress() as progress:
        request = _request(options, profile, cluster, wanted)
        found = find_plans(replace(request, looked=progress.looked))
    show_simulation(found.best.simulation, found.best.candidate.scenario)
    for sentence in _findings(found, devices, _fixed(request, wanted)):
        print(sentence)
    if options.out is not None:
        write_durably(options.out, json.dumps(_data(found), indent=1) + "\n")


def _findings(found: FoundPlans, devices: int, fixed: dict[str, str]) -> Iterator[str]:
    from pipeoptim.simulate.plan_search import TOLERANCE

    best, ways = found.best, f"{counted(found.shapes, 'way')} to train on {counted(devices, 'device')}"
    name = "the best" if found.may_gain is None else "the best in the time that was given"
    yield f"{ways}; {name}: {_words(best.candidate.shape.key())}"
    if found.may_gain is not None:
        yield f"another way may be better by up to {found.may_gain:.1%}; give more --seconds"
    yield f"{1 / best.simulation.throughput.median:.4g} s per mini-batch on {counted(best.candidate.devices, 'device')}"
    none = "none was simulated in the time that was given" if found.ended else "nothing else fits"
    for respect, other in found.alternatives.items():
        if other is not None:
            loss = found.loss(other)
            near = f" (below {TOLERANCE:.1%} the search does not tell ways apart)" if loss < 0 else ""
            yield f"other {respect}: {loss:+.1%}{near}: {_words(other.candidate.shape.key())}"
        else:
            yield f"other {respect}: {fixed.get(respect, none)}"
    to_run = "to run it" if best.candidate.runs_as_it_is else "to run it, with a model and data of your own"
    yield f"{to_run}: {best.candidate.command()}"


def _fixed(request: PlanRequest, wanted: dict[str, Any]) -> dict[str, str]:
    """In which respects nothing else was tried, since nothing else was asked for; and how to ask."""
    fixed = {} if len(request.methods) > 1 else {"method": "none was asked for; name others with --also"}
    for respect, setting in (("stages or replicas", "stages"), ("micro-batches", "microbatches"), ("slack", "slack")):
        if wanted.get(setting) not in (None, "", 0, "0"):
            fixed[respect] = f"no other fits beside --{setting}"
    return fixed


class SearchProgress:
    """A line in the terminal that says how far a long search is; nothing where there is no terminal."""

    def __init__(self) -> None:
        from rich.console import Console

        console = Console(stderr=True)
        self._status = console.status("searching") if console.is_terminal else None
        self._said = time.monotonic()

    def looked(self, cut: int, simulated: int) -> None:
        """So many shapes were cut and simulated."""
        if self._status is not None and time.monotonic() - self._said > 0.5:
            self._said = time.monotonic()
            self._status.update(f"searching: {counted(cut, 'way')} cut, {simulated:,} simulated (--seconds ends it)")

    def __enter__(self) -> SearchProgress:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()


def _cluster(
    options: SearchOptions, profile: Profile, devices: int, memory: list[float] | None, speeds: list[float]
) -> Cluster:
    from pipeoptim.simulate.cluster import read_cluster

    if memory is not None and (len(memory) != 1 or not 0 < memory[0] < inf):
        raise ConfigError(f"memory is {memory}, must be one number of GiB above 0, of each device")
    link = profile.link
    links = options.links or f"{(link.bandwidth or inf) / 1e9}:{link.latency * 1e3}"
    return read_cluster(devices, options.nodes, links, speeds, memory[0] * 2**30 if memory else inf)


def _request(options: SearchOptions, profile: Profile, cluster: Cluster, wanted: dict[str, Any]) -> PlanRequest:
    from pipeoptim.config import SETTINGS
    from pipeoptim.methods import get_method
    from pipeoptim.schedule import read_slack
    from pipeoptim.simulate.plan_search import PlanRequest

    if wanted["prediction"] != SETTINGS["prediction"].default or "refresh" in wanted:
        raise ConfigError(
            f"a search is for predictions of the kind {SETTINGS['prediction'].default!r}; leave --prediction and --refresh out, and see "
            "with pipeoptim simulate what others cost"
        )
    if options.seconds is not None and not 0 < options.seconds < inf:
        raise ConfigError(f"seconds is {options.seconds:g}, must be above 0: after which the best so far is taken")
    slack = read_slack(wanted["slack"])
    if isinstance(slack, tuple):
        raise ConfigError(
            f"slack is {wanted['slack']!r}, must be a single number in a search, whose stages are still to be cut"
        )
    return PlanRequest(
        profile,
        cluster,
        [get_method(name) for name in dict.fromkeys((wanted["method"], *(options.also or ())))],
        microbatches=[wanted["microbatches"]] if "microbatches" in wanted else (),
        slacks=(slack,) if slack else (0.0, 1.0),
        objective=options.objective or "",
        stages=[wanted["stages"]] if "stages" in wanted else (),
        seconds=inf if options.seconds is None else options.seconds,
    )


def _words(key: PlanKey) -> str:
    method, depth, replicas, m, slack, recompute = key
    parts = [method, counted(depth, "stage"), f"M = {m}"]
    parts += [counted(replicas, "replica")] if replicas > 1 else []
    parts += [f"slack {slack:g}"] if slack else []
    return ", ".join([*parts, "recomputation"] if recompute else parts)


def _data(found: FoundPlans) -> dict[str, Any]:
    from pipeoptim.simulate.stage_costs import plan_bytes

    def plan(one: RankedPlan) -> dict[str, Any]:
        names = ("method", "stages", "replicas", "microbatches", "slack", "recompute")
        candidate = one.candidate
        own: dict[str, Any] = dict(zip(names, candidate.shape.key(), strict=True))
        own["cut"] = list(candidate.scenario.lengths)
        return own | {
            "devices": candidate.devices,
            "bytes of the fullest device": candidate.memory,
            "bytes": asdict(plan_bytes(candidate.scenario)),
            "command": candidate.command(),
            "runs as it is": candidate.runs_as_it_is,
            "simulation": one.simulation.to_dict(),
            "findings": one.simulation.sentences(),
        }

    others = {name: None if one is None else {"loss": found.loss(one), **plan(one)} for name, one in found.alternatives.items()}
    best = plan(found.best) | {"timeline": _timeline(found.best.candidate.scenario)}
    about = {"format": 1, "pipeoptim": __version__, "model": found.model, "may gain": found.may_gain}
    return {**about, "plan": best, "alternatives": others}


def _timeline(scenario: Scenario) -> str | None:
    """An SVG of some mini-batches; None where there are too many stages for one."""
    from pipeoptim.simulate.timed_events import timed_events
    from pipeoptim.simulate.trace import MOST_TRACED, drawing, stage_traces

    if scenario.program.depth > MOST_DRAWN or scenario.actions > MOST_TRACED:
        return None
    return drawing(stage_traces(timed_events(scenario)))
