"""``pipeoptim plan --objective``: the options of a search by simulation, and what it prints."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeoptim.cli.new_files import check_new_files
from pipeoptim.cli.simulations import chosen_profile, show_simulation
from pipeoptim.errors import ConfigError, counted
from pipeoptim.version import __version__

if TYPE_CHECKING:
    from pipeoptim.simulate import Profile
    from pipeoptim.simulate.cluster import Cluster
    from pipeoptim.simulate.plan_search import FoundPlans, PlanKey, PlanRequest, RankedPlan


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
    out: Path | None

    def check_absent(self) -> None:
        """Raises ConfigError where one was given without --objective."""
        for one in fields(self):
            if getattr(self, one.name):
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
    found = find_plans(_request(options, profile, cluster, wanted))
    show_simulation(found.best.simulation, found.best.candidate.scenario)
    print(
        f"{counted(found.shapes, 'way')} to train on {counted(devices, 'device')}; the best: {_words(found.best.candidate.shape.key())}"
    )
    print(
        f"{1 / found.best.simulation.throughput.median:.4g} s per mini-batch on {counted(found.best.candidate.devices, 'device')}"
    )
    for name, other in found.alternatives.items():
        told = "nothing else fits" if other is None else f"{found.loss(other):+.1%}: {_words(other.candidate.shape.key())}"
        print(f"other {name}: {told}")
    print(f"to run it: {found.best.candidate.command()}")
    if options.out is not None:
        write_durably(options.out, json.dumps(_data(found), indent=1) + "\n")


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
            "simulation": one.simulation.to_dict(),
        }

    others = {name: None if one is None else {"loss": found.loss(one), **plan(one)} for name, one in found.alternatives.items()}
    best = plan(found.best)
    return {"format": 1, "pipeoptim": __version__, "model": found.model, "plan": best, "alternatives": others}
