"""Which runs a comparison has, with which optimizer, and which comparisons continue which."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import compare_cases
from pipeoptim.cli.app import _run
from pipeoptim.cli.commands.compare import _config
from pipeoptim.compare.folder import ComparisonFolder
from pipeoptim.compare.outcome import Outcome
from pipeoptim.compare.plan import plan_comparison
from pipeoptim.compare.settings import ComparisonSettings, check_continues
from pipeoptim.compare.summary import Comparison
from pipeoptim.compare.table import notes, setting
from pipeoptim.config import Component
from pipeoptim.errors import ConfigError
from pipeoptim.methods import METHODS, get_method
from pipeoptim.options import RUN_SETTINGS
from pipeoptim.train.engines import make_emulator
from pipeoptim.train.setup import build_setup
from pipeoptim.train.shorten import shortened

BASE = compare_cases.recipe()


def test_every_method_and_seed_once_with_a_folder_of_its_own() -> None:
    plan = plan_comparison(ComparisonSettings(BASE, (*METHODS, "pipemare(anneal_updates=5)"), (3, 7)))
    assert not plan.left_out, "M = D is defined for all"
    assert {(run.config.method, run.config.seed) for run in plan.runs} == {
        (name, seed) for name in (*METHODS, "pipemare(anneal_updates=5)") for seed in (3, 7)
    }
    assert len({run.name for run in plan.runs}) == len(plan.runs)
    assert all("/" not in run.name and "(" not in run.name for run in plan.runs)


def test_a_method_that_refuses_is_left_out_with_the_reason() -> None:
    plan = plan_comparison(ComparisonSettings(replace(BASE, microbatches=1), tuple(METHODS)))
    refusing = {name for name, method in METHODS.items() if method.at_least_depth_microbatches}
    assert set(plan.left_out) == refusing and refusing
    assert all("microbatches" in reason for reason in plan.left_out.values())
    with pytest.raises(ConfigError, match="no method is left"):
        plan_comparison(ComparisonSettings(replace(BASE, microbatches=1), tuple(refusing)))


def test_a_method_that_cannot_do_what_the_options_ask_for_is_left_out() -> None:
    plan = plan_comparison(ComparisonSettings(replace(BASE, overlap=True, prediction="paper"), tuple(METHODS)))
    assert {"gpipe", "1f1b"} <= set(plan.left_out), "they flush, so there is no next forward to overlap with"
    assert all("overlap" in reason for reason in plan.left_out.values())
    assert {run.config.overlap for run in plan.runs} == {True}


def test_rates_by_the_gap_leave_methods_without_gaps_as_they_are() -> None:
    settings = ComparisonSettings(replace(BASE, rate_by_gap=0.5), ("1f1b", "gpipe", "pipeoptim"))
    plan = plan_comparison(settings)
    assert not plan.left_out
    assert {run.config.method: run.config.rate_by_gap for run in plan.runs} == {"1f1b": 0.0, "gpipe": 0.0, "pipeoptim": 0.5}
    told = notes(Comparison(settings, [Outcome(run.config.method, 0, "adamw", "finished") for run in plan.runs], {}))
    assert any("the same learning rate under 1f1b, gpipe: no gradient is old there" in note for note in told)
    with pytest.raises(ConfigError, match=r"rate_by_gap is 0.5, but no gradient is old in 1f1b, gpipe; leave it out"):
        plan_comparison(replace(settings, methods=("1f1b", "gpipe")))


def test_every_option_that_changes_what_is_computed_is_offered_and_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["compare", "--help"]) == 0
    text = "".join(capsys.readouterr().out.split())  # lines are broken anywhere
    for name, known in RUN_SETTINGS.items():
        if known.computes:
            assert f"--{name.replace('_', '-')}" in text and "".join(known.help.split()) in text, name
    config = _config(BASE, {"clip": 1.5, "compress": "int8", "prediction": "paper"}, None, None)
    assert (config.clip, config.compress, config.threads) == (1.5, "int8", 1)
    assert setting(config).endswith(", clip 1.5, compress int8")
    assert setting(BASE) == setting(replace(BASE, monitor_every=3)), "what changes no run is not told"


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.optimizer])
def test_own_optimizer_reaches_every_stage(name: str) -> None:
    """What the method says of stage k is what the optimizer of stage k has."""
    settings = ComparisonSettings(BASE, (name,), own_lr=0.005)
    (run,) = plan_comparison(settings).runs
    setup = build_setup(run.config)
    _, optimizers = make_emulator(setup, setup.task.loss)
    own = get_method(name).optimizer
    assert own is not None
    for k, optimizer in optimizers.items():
        assert type(optimizer).__name__ == own.name
        group = optimizer.param_groups[0]
        assert group["initial_lr"] == 0.005
        for key, value in own.options(k, BASE.stages).items():
            assert tuple(group[key]) == value if isinstance(value, tuple) else group[key] == value


def test_own_learning_rate() -> None:
    sgd = replace(BASE, optimizer=Component("sgd", {"lr": 0.3}))
    rates = [
        plan_comparison(settings).runs[0].config.optimizer.options["lr"]
        for settings in (
            ComparisonSettings(BASE, ("nesterov",)),
            ComparisonSettings(sgd, ("nesterov",)),
            ComparisonSettings(sgd, ("nesterov",), own_lr=0.2),
            ComparisonSettings(sgd, ("nesterov",), same_optimizer=True),
        )
    ]
    assert rates == [0.01, 0.001, 0.2, 0.3]
    assert plan_comparison(ComparisonSettings(sgd, ("nesterov",), same_optimizer=True)).runs[0].config.optimizer.target == "sgd"


def test_methods_and_seeds_may_be_added_nothing_else_changed() -> None:
    old = ComparisonSettings(BASE, ("gpipe", "naive"), (0, 1))
    check_continues(old, replace(old, methods=("pipeoptim", "naive", "gpipe"), seeds=(2, 1, 0), target=1.0), "x")
    check_continues(old, ComparisonSettings.from_json(old.to_json()), "x")
    for new, words in (
        (replace(old, methods=("gpipe",)), "naive"),
        (replace(old, seeds=(0,)), "--seeds"),
        (replace(old, own_lr=1.0), "own_lr"),
        (replace(old, config=replace(BASE, steps=21)), "steps is 21.*has 20.*--out"),
        (replace(old, config=replace(BASE, optimizer=BASE.optimizer.with_options(lr=1.0))), "optimizer lr is 1.0"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_continues(old, new, "x")


def test_folder_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ConfigError, match="holds no comparison"):
        ComparisonFolder(tmp_path).begin(ComparisonSettings(BASE, ("gpipe",)), "", {})
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(ConfigError, match="no comparison in"):
        ComparisonFolder(tmp_path).read_settings()
    (tmp_path / "compare.json").write_text("{}")
    with pytest.raises(ConfigError, match="damaged"):
        ComparisonFolder(tmp_path).read_settings()


def test_warm_up_is_shortened_only_where_it_must_be() -> None:
    assert shortened(BASE) == BASE
    assert shortened(replace(BASE, steps=8)).lr_schedule.options["warmup"] == 2
    assert shortened(replace(BASE, lr_schedule=Component("constant"))).lr_schedule == Component("constant")
