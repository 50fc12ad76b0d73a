"""A run's settings as a file: what is printed means the same when it is read, and the command line goes before it."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from pipeoptim.cli.app import _run
from pipeoptim.config import Component, TrainConfig
from pipeoptim.errors import ConfigError
from pipeoptim.train.config_file import chosen_run, read_config_file, to_toml
from pipeoptim.train.rundir import RunDir

plain = st.recursive(
    st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=6,
)
components = st.builds(Component, st.text(), st.dictionaries(st.text(), plain, max_size=3))
configs = st.builds(
    TrainConfig, st.text(), components, components, components, components, engine=st.text(), clip=st.floats(0, 9)
)


@given(configs)
def test_toml_round_trip(config: TrainConfig) -> None:
    data = tomllib.loads(to_toml(config))
    components = {name: Component(**value) if isinstance(value, dict) else value for name, value in data.items()}
    assert TrainConfig(**components) == config


def written(folder: Path, text: str, name: str = "run.toml") -> Path:
    (folder / name).write_text(text)
    return folder / name


def read(path: Path, recipe: str | None = None) -> TrainConfig:
    return read_config_file(path, recipe, tiny=False, default="tiny:recipe")[0]


def test_a_file_is_a_whole_run_or_changes_a_recipe(tmp_path: Path) -> None:
    config = replace(tiny.recipe(), clip=0.5, slack="1", stages=3)
    assert read(written(tmp_path, to_toml(config))) == config
    assert read(written(tmp_path, config.to_json(), "config.json")) == config, "that of a run"
    assert read(written(tmp_path, "stages = 3\nclip = 1\n[optimizer.options]\nlr = 0.5\n")) == replace(
        tiny.recipe(), stages=3, clip=1.0, optimizer=tiny.recipe().optimizer.with_options(lr=0.5)
    )
    assert read(written(tmp_path, "recipe = 'tiny:steady'\nsteps = 8"), None) == replace(tiny.steady(), steps=8)
    assert read(written(tmp_path, "recipe = 'tiny:steady'"), "tiny:recipe") == tiny.recipe(), "the command line goes before"
    assert read(written(tmp_path, "recipe = 'tiny:paper_prediction'\nmethod = 'gpipe'")).prediction == "refined"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stages = ", "is not TOML"),
        ("stagse = 3", "unknown fields: stagse; did you mean 'stages'?"),
        ("stages = '3'", "stages is '3' in the configuration, must be of type int"),
        ("[optimizer]\ntarget = 3", "optimizer is {'target': 3}"),
        ("[optimizer]\noptions = 3", "options of optimizer is 3, must be a table"),
        ("[data.options]\nday = 2020-01-01", "does not fit into JSON"),
        ("[data.options]\nx = nan", "does not fit into JSON"),
        ("method = 'pipoptim'", "did you mean 'pipeoptim'?"),
    ],
)
def test_a_file_that_is_none_is_told(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words.replace("?", "\\?")):
        read(written(tmp_path, text))


def test_further_refusals(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match=r"/dev/zero cannot be read \(is a device, must be a file"):  # it has no end
        read(Path("/dev/zero"))
    (tmp_path / "config.json").symlink_to("/dev/zero")
    (tmp_path / "result.json").symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match="cannot be read \\(is a device"):
        RunDir(tmp_path).read_config()
    assert RunDir(tmp_path).finished_at() is None
    with pytest.raises(ConfigError, match="no recipe to change; leave --recipe out"):
        read(written(tmp_path, to_toml(tiny.recipe())), "tiny:recipe")
    with pytest.raises(ConfigError, match="options of data has None"):
        to_toml(replace(tiny.recipe(), data=Component("tiny:Task", {"stuck": None})))


def test_the_command_prints_what_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _run(["train", "--recipe", "tiny:recipe", "--steps", "8", "--clip", "1.5", "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert not list(tmp_path.iterdir()) and "# Largest norm of the gradients; 0: no clipping.\nclip = 1.5" in printed
    written(tmp_path, printed)
    assert _run(["train", "--config", "run.toml", "--steps", "4", "--quiet"]) == 0
    made = TrainConfig.from_json(Path("runs/tiny-pipeoptim/config.json").read_text())
    assert (made.steps, made.clip, made.lr_schedule.options["warmup"]) == (4, 1.5, 1), "the command line goes before the file"
    assert _run(["train", "--config", "run.toml", "--steps", "4", "--quiet"]) == 0, "the same again"
    assert "is finished" in capsys.readouterr().err
    written(tmp_path, "recipe = 'tiny:recipe'\nexport = true", "more.toml")
    assert _run(["train", "--config", "more.toml", "--no-export", "--print-config"]) == 0
    assert "\nexport = false\n" in capsys.readouterr().out, "the command line also takes back"
    assert _run(["train", "--resume", "--name", "tiny-pipeoptim", "--print-config"]) == 0
    assert read(written(tmp_path, capsys.readouterr().out, "own.toml")) == made, "the run's own"
    for option, value in (("--config", "run.toml"), ("--set", "model.width=8")):
        assert _run(["train", "--resume", "--name", "tiny-pipeoptim", option, value]) == 2
        assert f"{option} belongs to a new run" in capsys.readouterr().err


def test_what_is_set_goes_before_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, to_toml(replace(tiny.recipe(), model=Component("tiny:model", {"width": 8}))))
    config, _ = chosen_run(None, False, file, None, None, "chars", ["model.width=4", "data.seconds=0.5", "optimizer.lr=1e-3"])
    assert (config.model.options, config.data.options, config.optimizer.options["lr"]) == ({"width": 4}, {"seconds": 0.5}, 1e-3)
    assert config.recipe == "tiny"
