"""The tiny forms: some steps of every recipe, end to end; nothing is downloaded."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from pipeoptim.cli.app import _run
from pipeoptim.config import TrainConfig
from pipeoptim.errors import ConfigError
from pipeoptim.train import run
from pipeoptim.train.recipes import get_recipe, recipes

NAMES = sorted(recipes())
STEPS = 6  # two more than there are mini-batches in flight


@pytest.mark.parametrize("name", NAMES)
def test_some_steps(name: str, tmp_path: Path) -> None:
    if name == "causal_lm":
        pytest.importorskip("transformers", "5.0", reason="recipe causal_lm needs Transformers 5")
        pytest.importorskip("datasets", reason="recipe causal_lm needs datasets")
    config = replace(get_recipe(name, tiny=True), steps=STEPS, eval_every=0, eval_batches=1)
    warmup = {"warmup": 2} if "warmup" in config.lr_schedule.options else {}
    config = replace(config, lr_schedule=config.lr_schedule.with_options(**warmup))
    result = run(config, tmp_path / "run", progress=False)
    losses = [row["loss"] for row in result.rows() if "loss" in row]
    assert len(losses) == result.step == STEPS
    assert all(math.isfinite(loss) for loss in [*losses, result.val_loss or math.nan])
    assert [stage.updates for stage in result.stages] == [STEPS] * config.stages
    assert len(result.stages) == 4


@pytest.mark.parametrize("name", NAMES)
def test_the_setting_is_that_of_the_recipe(name: str) -> None:
    """Model and data are tiny; the optimizer with all its options but lr, the schedule's shape and the method stay."""
    full, tiny = get_recipe(name), get_recipe(name, tiny=True)
    assert tiny.recipe == f"{name}-tiny"
    assert TrainConfig.from_json(tiny.to_json()) == tiny
    assert tiny.model.target == full.model.target
    assert tiny.optimizer.with_options(lr=0) == full.optimizer.with_options(lr=0)
    assert tiny.lr_schedule.target == full.lr_schedule.target
    assert tiny.lr_schedule.with_options(warmup=0) == full.lr_schedule.with_options(warmup=0)
    assert (tiny.method, tiny.prediction, tiny.microbatches > 1) == (full.method, full.prediction, full.microbatches > 1)
    assert tiny.steps > 0 == tiny.epochs


def test_it_learns(tmp_path: Path) -> None:
    """The quickest of the paper's settings; the others take longer than a test may."""
    config = replace(get_recipe("vgg16_cifar100", tiny=True), steps=120, eval_every=0)
    result = run(config, tmp_path / "run", progress=False)
    first = next(row["loss"] for row in result.rows())
    assert first == pytest.approx(math.log(10), abs=0.3)
    assert result.val_loss is not None
    assert result.val_loss < 0.5 * first
    assert result.val_metrics["val_accuracy"] > 0.7


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["train", "--recipe", "vgg16-cifar100", "--tiny"]
    assert _run([*options, "--steps", "4", "--eval-every", "0"]) == 0
    assert "finished at step 4 of 4" in capsys.readouterr().out
    assert (tmp_path / "runs/vgg16_cifar100-tiny-pipeoptim/result.json").exists()
    assert _run([*options, "--resume"]) == 0
    assert "is finished (4 of 4 steps)" in capsys.readouterr().err
    assert _run(["train", "--recipe", "vgg16-cifar100", "--resume", "--name", "vgg16_cifar100-tiny-pipeoptim"]) == 2
    assert "--recipe is vgg16_cifar100, but run" in capsys.readouterr().err


def test_recipe_without_a_tiny_form(monkeypatch: pytest.MonkeyPatch) -> None:
    config = get_recipe("digits")

    def one_size() -> TrainConfig:
        return config

    monkeypatch.setattr("pipeoptim.train.recipes.recipes", lambda: {"one_size": one_size})
    assert get_recipe("one-size") == config
    with pytest.raises(ConfigError, match="'one-size' has no tiny form; leave --tiny out"):
        get_recipe("one-size", tiny=True)
