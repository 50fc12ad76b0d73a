"""Epochs become steps when the data is read; the run's own configuration then has the number."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeoptim.cli.app import _run
from pipeoptim.config import Component, TrainConfig
from pipeoptim.errors import ConfigError
from pipeoptim.train import run
from pipeoptim.train.checks import check
from pipeoptim.train.recipes import get_recipe
from pipeoptim.train.rundir import RunDir
from pipeoptim.train.setup import build_setup, with_steps

DIGITS = 1437


def write_cifar(root: Path, count: int) -> None:
    folder = root / "data" / "cifar-100-binary"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3072), dtype=np.uint8)
    for name in ("train.bin", "test.bin"):
        (folder / name).write_bytes(b"".join(bytes([0, i % 100]) + row.tobytes() for i, row in enumerate(pixels)))


def epochs(**changes: Any) -> TrainConfig:
    return replace(get_recipe("digits", tiny=True), **{"steps": 0, "epochs": 2, "batch_size": 100, **changes})


def test_epochs_are_passes_over_the_training_examples() -> None:
    assert with_steps(epochs()).steps == 2 * (DIGITS // 100)
    assert with_steps(epochs(batch_size=48, epochs=3)).steps == 3 * (DIGITS // 48)
    assert build_setup(epochs()).config.steps == 28
    assert build_setup(epochs()).config.epochs == 0


def test_steps_overrule_epochs() -> None:
    config = with_steps(epochs(steps=5))
    assert (config.steps, config.epochs) == (5, 0)
    with_steps(replace(config, data=Component("nowhere:data")))  # nothing is read


def test_a_run_needs_one_of_them() -> None:
    check(epochs())
    with pytest.raises(ConfigError, match="steps is 0"):
        check(epochs(epochs=0))
    with pytest.raises(ConfigError, match="epochs is -1"):
        check(epochs(epochs=-1))


class Endless:
    """A task that does not count its examples."""

    def describe(self) -> str:
        return "random numbers"


def test_data_without_epochs() -> None:
    with pytest.raises(ConfigError, match=r"epochs is 2, but the data \(random numbers\) has no steps_per_epoch.*set steps"):
        with_steps(epochs(), Endless())  # type: ignore[arg-type]


def test_a_run_in_epochs_is_written_in_steps_and_can_be_resumed(tmp_path: Path) -> None:
    config = epochs(epochs=1, batch_size=200, eval_every=0, eval_batches=1, checkpoint_every=3)
    result = run(config, tmp_path / "run", progress=False)
    assert (result.status, result.step) == ("finished", 7)
    written = RunDir(tmp_path / "run").read_config()
    assert written == replace(config, steps=7, epochs=0)
    assert written.fingerprint() == config.fingerprint()
    with pytest.raises(ConfigError, match="is finished"):
        run(config, tmp_path / "run", resume=True, progress=False)
    longer = run(replace(written, steps=9), tmp_path / "run", resume=True, progress=False)
    assert longer.step == 9


def test_a_full_recipe_on_data_of_its_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole of VGG-16 for two steps; a shortened run has the schedule of the whole one, in fewer steps."""
    monkeypatch.chdir(tmp_path)
    write_cifar(tmp_path, 12)
    config = replace(get_recipe("vgg16_cifar100"), batch_size=4)
    assert build_setup(config).config.steps == 120 * 3
    assert _run(["train", "--recipe", "vgg16-cifar100", "--batch-size", "4", "--steps", "2", "--eval-every", "0"]) == 0
    assert "finished at step 2 of 2" in capsys.readouterr().out
    assert RunDir(tmp_path / "runs/vgg16_cifar100-pipeoptim").read_config().epochs == 0


@pytest.mark.parametrize(("option", "data"), [("classes", "digits"), ("vocab_size", "unicode_names")])
def test_a_model_too_small_for_the_data_is_told_early(option: str, data: str) -> None:
    recipe = "digits" if data == "digits" else "gnmt8_wmt16"
    config = get_recipe(recipe, tiny=True)
    config = replace(config, model=config.model.with_options(**{option: 9}))
    with pytest.raises(ConfigError, match=rf"the model's {option} is 9, but the data \({data}.* has \d+; raise it"):
        build_setup(config)
