"""Plans by simulation: none of all cuts of all shapes is better, links and speeds of a cluster count, and what is refused."""

import json
import re
import shlex
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeoptim.cli.app import _run
from pipeoptim.cli.plan_options import _findings
from pipeoptim.errors import ConfigError
from pipeoptim.methods import get_method
from pipeoptim.simulate import Scenario, TransformerSizes, plan_search, simulate, synthetic
from pipeoptim.simulate.cluster import read_cluster
from pipeoptim.simulate.plan_search import TOLERANCE, PlanRequest, _cut, _shapes, find_plans
from pipeoptim.train import api as train_api
from pipeoptim.train.recipes import get_recipe
from pipeoptim.train.setup import build_model


def uneven(seconds=(1.0, 4.0, 2.0, 2.0, 3.0), rows=4, gib=1.0):
    """Blocks of these seconds, each with a GiB of weights and of activations, a quarter of it shared with the block before."""
    profile = synthetic(TransformerSizes(rows=rows, latency=0.01, bandwidth=1e12), len(seconds))
    size = gib * 2**30
    blocks = tuple(
        replace(
            block,
            forward=(s / 3 / rows, s / 3),
            backward=(2 * s / 3 / rows, 2 * s / 3),
            weight_bytes=size,
            saved_bytes=(size / rows, size),
            shared_bytes=(size / 4 / rows, size / 4),
        )
        for block, s in zip(profile.blocks, seconds, strict=True)
    )
    return replace(profile, blocks=blocks, optimizer=replace(profile.optimizer, state_bytes=2.0))


def request(
    profile, devices=3, memory=float("inf"), methods=("pipeoptim", "1f1b"), speeds=(), links="1000:10", nodes="", **more
):
    cluster = read_cluster(devices, nodes, links, speeds, memory * 2**30)
    return PlanRequest(profile, cluster, [get_method(name) for name in methods], **more)


@pytest.mark.parametrize(
    ("objective", "memory", "speeds"), [("time", 17.0, ()), ("cost", 100.0, (1, 1, 2)), ("memory", 60.0, ())]
)
def test_no_cut_of_any_shape_is_better(objective, memory, speeds):
    profile = uneven()
    wanted = request(profile, memory=memory, speeds=speeds, objective=objective)
    found = find_plans(wanted)
    goals = []
    for shape in _shapes(wanted):
        depth, devices = shape.program.depth, shape.program.depth * shape.replicas
        base = _cut(replace(wanted, cluster=replace(wanted.cluster, memory=float("inf"))), shape).scenario
        for ends in combinations(range(1, 5), depth - 1):
            one: Scenario = replace(base, lengths=tuple(b - a for a, b in pairwise((0, *ends, 5))))
            run = simulate(one)
            fullest = max(stage.memory for stage in run.stages)
            if fullest <= memory * 2**30:
                seconds = 1 / run.throughput.median
                goals.append({"time": seconds, "cost": seconds * devices, "memory": fullest}[objective])
    assert found.best.goal[0] <= min(goals) * (1 + TOLERANCE)
    assert found.best.candidate.memory <= memory * 2**30
    for name, other in found.alternatives.items():
        assert other is None or found.loss(other) >= -TOLERANCE, name
        assert other is None or other.candidate.shape.key() != found.best.candidate.shape.key()


def test_slow_links_between_nodes_keep_replicas_within_them():
    """Averages of weights over the slow link take seconds, activations next to nothing: stages go over it, replicas stay in their node."""
    profile = uneven((2.0, 2.0, 2.0, 2.0), rows=8, gib=4.0)
    found = find_plans(
        request(profile, 4, methods=("pipeoptim",), nodes="2", links="1000:0.01,1:0.01", stages=(2,), recompute=("",))
    )
    best = found.best.candidate
    assert (best.scenario.replicas, best.shape.together, best.scenario.replica_link.bandwidth) == (2, True, 1e12)
    cluster = read_cluster(8, "2,2", "100:0,10:1,1:5")
    assert [cluster.link(0, d).bandwidth / 1e9 for d in (1, 2, 3, 4, 7)] == [100, 10, 10, 1, 1]


def test_where_nothing_takes_time_no_plan_is_worse():
    profile = uneven((0.0, 0.0))
    free = tuple(replace(b, output_bytes=(0.0, 0.0), gradient_bytes=(0.0, 0.0), weight_bytes=0.0) for b in profile.blocks)
    profile = replace(profile, blocks=free, link=replace(profile.link, latency=0.0))
    found = find_plans(request(profile, 2, methods=("pipeoptim",), links="1000:0"))
    assert [found.loss(other) for other in found.alternatives.values() if other] == [0.0] * 4


def test_an_alternative_that_is_better_by_less_than_the_tolerance_is_explained():
    best = find_plans(request(uneven(), methods=("pipeoptim",)))
    other = next(one for one in best.alternatives.values() if one is not None)
    near = replace(best.best, goal=(best.best.goal[0] * (1 - TOLERANCE / 2), best.best.goal[1]))
    said = list(_findings(replace(best, alternatives={"slack": near, "micro-batches": other}), 3, {}))
    assert any(re.match(r"other slack: -0\.\d% \(below 0\.5% the search does not tell ways apart\): ", one) for one in said)
    assert any(re.match(r"other micro-batches: \+\d+\.\d%: ", one) for one in said)


def planned(capsys, *arguments):
    code = _run(["plan", "--objective", "time", *arguments])
    out = capsys.readouterr()
    return code, out.out, " ".join(out.err.split())


def test_the_command_prints_the_plan_and_how_to_run_it(capsys, tmp_path):
    common = ("--synthetic", "--sizes", "layers=4,width=512,rows=8", "--devices", "2", "--memory", "8", "--stages", "2")
    code, out, _ = planned(capsys, *common, "--also", "1f1b", "--out", str(tmp_path / "plan.json"))
    assert code == 0
    for words in (
        "--method pipeoptim --stages 2",
        "other method: +",
        "--cut 2,2 --engine processes",
        "to run it, with a model and data of your own: pipeoptim train --model MODULE:FUNCTION",
        "other micro-batches: +",
        "other stages or replicas: no other fits beside --stages",
    ):
        assert words in out
    found = json.loads((tmp_path / "plan.json").read_text())
    assert (found["plan"]["stages"], found["plan"]["cut"], found["alternatives"]["stages or replicas"]) == (2, [2, 2], None)


def test_the_printed_command_trains_the_model_of_the_profile(capsys, tmp_path, monkeypatch):
    """It comes to the point where processes would begin."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "fuzz"))
    begun = []

    def launch(directory, config, *_, **__):
        begun.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(train_api, "launch", launch)
    run = get_recipe("small_recipe:recipe")
    blocks = len(build_model(run))
    named = ["--recipe", "small_recipe:recipe", "--set", "optimizer.lr=0.01"]
    profile = synthetic(TransformerSizes(rows=run.batch_size), blocks)
    replace(profile, model="small", made={"train": named}).write(tmp_path / "small.json")
    code, out, _ = planned(capsys, "--profile", "small.json", "--devices", "2", "--stages", "2")
    assert code == 0 and "other method: none was asked for; name others with --also" in out
    command = shlex.split(out.rpartition("to run it: ")[2])
    assert command[: 2 + len(named)] == ["pipeoptim", "train", *named]
    _run(command[1:])
    assert [(one.stages, one.engine, one.optimizer.options["lr"]) for one in begun] == [(2, "processes", 0.01)]


def test_a_search_that_takes_too_long_ends_with_the_best_so_far(monkeypatch):
    profile = uneven((2.0, 3.0, 2.0, 2.0, 1.0, 2.0), rows=16)
    looks = []
    quick = find_plans(request(profile, 6, seconds=1e-9, looked=lambda *counts: looks.append(counts)))
    full = find_plans(request(profile, 6))
    assert quick.bound is not None and full.bound is None
    assert quick.bound <= full.best.goal[0] * (1 + 1e-9) and quick.best.goal[0] >= full.best.goal[0] * (1 - TOLERANCE)
    assert looks[0] == (0, 0) and looks[-1][1] == 1 and quick.ended and not full.ended, (
        "nothing is simulated when the time is over"
    )
    clock = SimpleNamespace(now=0.0)

    def later(_, simulated):
        clock.now = 2.0 if simulated >= 3 else 0.0

    monkeypatch.setattr(plan_search, "time", SimpleNamespace(monotonic=lambda: clock.now))
    some = find_plans(request(profile, 6, seconds=1.0, looked=later))
    assert some.ended and any(some.alternatives.values())
    assert all(one is None or some.loss(one) >= 0 for one in some.alternatives.values()), "the best of all that were simulated"


def test_a_plan_of_a_search_that_was_ended_says_so_in_the_terminal_and_on_its_page(capsys, tmp_path):
    path = tmp_path / "plan.json"
    common = ("--synthetic", "--sizes", "layers=4,rows=8", "--devices", "4")
    code, out, _ = planned(capsys, *common, "--seconds", "1e-9", "--out", str(path))
    assert (code, "other micro-batches: none was simulated in the time that was given" in out) == (0, True)
    better = re.search("another way may be better by up to [0-9.]+%", out)
    assert better and _run(["report", str(path)]) == 0 and better[0] in path.with_suffix(".html").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--devices", "2", "--synthetic", "--seconds", "0"), "seconds is 0, must be above 0"),
        ((), "--objective needs --devices"),
        (("--devices", "2"), "give either --profile FILE"),
        (("--devices", "2", "--synthetic", "--tiny"), "leave the options that name, measure or draw a model out"),
        (("--devices", "2", "--synthetic", "--bandwidth", "0"), "leave the options that name, measure or draw a model out"),
        (("--devices", "2", "--synthetic", "--device", "cuda"), "leave the options that name, measure or draw a model out"),
        (("--devices", "2", "--synthetic", "--prediction", "in_progress"), "leave --prediction and --refresh out"),
        (("--devices", "2", "--synthetic", "--links", "1:1,2:2"), "must be one for each level of the cluster"),
        (("--devices", "2", "--synthetic", "--links", "0:1"), "must have at least 1, of at least 0 and above 0"),
        (("--devices", "2", "--synthetic", "--nodes", "x"), "cannot be read; write sizes of the inner levels as 8,4"),
        (("--devices", "2", "--synthetic", "--memory", "0.001"), "on 2 devices of 0.001 GiB was found"),
        (("--devices", "0", "--synthetic"), "devices is 0, must be at least 1"),
        (("--devices", "20000", "--synthetic", "--sizes", "layers=2"), "devices is 20000, must be at most 10,000"),
        (("--devices", "2", "--synthetic", "--sizes", "layers=6000"), "6,000 blocks are more than the 5,000"),
        (("--devices", "2", "--synthetic", "--links", "1e-320"), "must have at least 1, of at least 0 and above 0"),
        (("--devices", "2", "--synthetic", "--speed", "1e308"), "must be numbers above 0 (1e-30 to 1e+30)"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_a_sentence(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, error = planned(capsys, *arguments)
    assert (code, out) == (2, "")
    assert words in error
    assert list(tmp_path.iterdir()) == []


def test_an_objective_must_be_known_and_its_options_are_its_own(capsys):
    with pytest.raises(ConfigError, match="objective is 'speed', must be one of time, cost, memory"):
        request(uneven(), objective="speed")
    assert _run(["plan", "--nodes", "8"]) == 2
    assert "--nodes belongs to a search by simulation; give --objective as well" in capsys.readouterr().err
    assert _run(["plan", "--seconds", "0"]) == 2
    assert "--seconds belongs to a search by simulation" in capsys.readouterr().err
