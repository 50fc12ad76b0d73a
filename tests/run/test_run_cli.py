"""What a newcomer meets: help that teaches, answers at once, files that can be read, a run under their own torchrun."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import processes
import tiny
from compare import assert_same_state
from pipeoptim import __version__
from pipeoptim.cli.app import _run
from pipeoptim.config import SETTINGS, TrainConfig
from pipeoptim.telemetry.metrics import MetricsFile, read_rows, truncate_after
from pipeoptim.train import run
from pipeoptim.train.result import RunResult
from pipeoptim.train.rundir import RunDir


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for nothing_else in (["--help"], []):
        assert _run(nothing_else) == 0
        assert "pipeoptim train --help" in capsys.readouterr().out
    assert _run(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for part in ("Examples:", "--engine processes", "--resume --name", "Ctrl-C", "--microbatches"):
        assert part in text


@pytest.mark.parametrize("name", [name for name, known in SETTINGS.items() if known.offered])
def test_train_offers_every_setting_with_the_help_that_is_told_once(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["train", "--help"]) == 0
    shown, known = capsys.readouterr().out, SETTINGS[name]
    assert f"--{name.replace('_', '-')} " in shown
    for text in (shown, TrainConfig.__doc__ or ""):
        assert "".join(known.help.split()) in "".join(text.split())  # lines are broken anywhere
    assert all(choice in known.help for choice in known.choices)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["--version"]) == 0
    assert capsys.readouterr().out == f"pipeoptim {__version__}\n"


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, pipeoptim.cli.app as a; a._run(['train', '--help']); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True)


def test_options_reach_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"stages": 3, "microbatches": 2, "batch_size": 4, "steps": 9, "seed": 3, "eval_every": 0, "checkpoint_every": 5}
    given |= {"method": "pipeoptim_stash", "prediction": "paper", "engine": "emulator"}
    options = [part for key, value in given.items() for part in ("--" + key.replace("_", "-"), str(value))]
    arguments = ["--recipe", "tiny:recipe", "--optimizer", "sgd", "--lr", "0.5", "--out", "there", "--name", "mine", *options]
    assert _run(["train", *arguments]) == 0
    config = TrainConfig.from_json((tmp_path / "there/mine/config.json").read_text())
    assert {key: getattr(config, key) for key in given} == given
    assert config.optimizer.options["lr"] == 0.5
    assert config.optimizer.options["weight_decay"] == 0.1
    out = capsys.readouterr().out
    for part in ("finished at step 9 of 9", "validation loss", "accuracy", "samples/s", "there/mine/loss.png", "torch"):
        assert part in out
    result = RunResult.read(tmp_path / "there/mine")
    assert [stage.gap for stage in result.stages] == [1, 1, 0]
    assert [stage.updates for stage in result.stages] == [9, 9, 9]
    assert result.to_json() == (tmp_path / "there/mine/result.json").read_text()


def test_a_recipe_that_chooses_its_prediction_also_trains_under_methods_that_make_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = ["train", "--recipe", "tiny:paper_prediction", "--steps", "2", "--quiet"]
    for method, prediction in (("gpipe", "refined"), ("spectrain", "paper")):
        assert _run([*recipe, "--method", method, "--name", method]) == 0
        assert TrainConfig.from_json((tmp_path / f"runs/{method}/config.json").read_text()).prediction == prediction
    assert _run([*recipe, "--method", "gpipe", "--prediction", "paper", "--name", "asked"]) == 2
    assert "predicts no weights" in capsys.readouterr().err


def test_a_run_shorter_than_the_recipes_warm_up_has_a_shorter_one_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for steps, warmup, told in ((3, 0, True), (12, 3, True), (16, 4, False)):
        assert _run(["train", "--recipe", "tiny:recipe", "--steps", str(steps), "--name", f"n{steps}"]) == 0
        config = TrainConfig.from_json((tmp_path / f"runs/n{steps}/config.json").read_text())
        assert (config.steps, config.lr_schedule.options["warmup"]) == (steps, warmup)
        line = f"warm-up: {warmup} updates, a quarter of the {steps} steps, in place of the recipe's 4\n"
        assert (line in capsys.readouterr().out) == told


def test_resume_refuses_other_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run(tiny.recipe(), "runs/tiny", progress=False)
    for option, value, own in (("--lr", "0.5", "0.01"), ("--microbatches", "2", "1"), ("--optimizer", "sgd", "adamw")):
        assert _run(["train", "--resume", "--name", "tiny", option, value]) == 2
        error = capsys.readouterr().err
        assert f"{option} is {value}" in error
        assert f"begun with {own}" in error


def test_weights_held_are_measured(tmp_path: Path) -> None:
    """Two copies where the forward is predicted, one on the last stage, D-k for stashing."""
    for method, copies in (("pipeoptim", [2, 2, 1]), ("pipedream", [3, 2, 1]), ("gpipe", [1, 1, 1])):
        config = replace(tiny.recipe(), method=method, stages=3)
        result = run(config, tmp_path / method, progress=False)
        assert [stage.weight_copies for stage in result.stages] == copies
        assert [stage.weight_bytes for stage in result.stages] == [4 * s.parameters * s.weight_copies for s in result.stages]


def test_curve_is_a_picture(tmp_path: Path) -> None:
    import matplotlib.image

    run(tiny.recipe(), tmp_path / "run", progress=False)
    picture = matplotlib.image.imread(tmp_path / "run/loss.png")
    assert picture.shape[:2] == (750, 1200)
    blue, orange = picture[..., 2] - picture[..., 0] > 0.3, picture[..., 0] - picture[..., 2] > 0.5
    assert blue.sum() > 500
    assert orange.sum() > 500


def test_metrics_are_lines_of_json(tmp_path: Path) -> None:
    run(tiny.recipe(), tmp_path / "run", progress=False)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if "loss" in row]
    assert [row["step"] for row in train] == list(range(1, 25))
    assert all(row.keys() == {"step", "loss", "lr", "samples_per_second"} for row in train)
    assert [row["step"] for row in rows if "val_loss" in row] == [6, 12, 18, 24]
    assert all(0 <= row["val_accuracy"] <= 1 for row in rows if "val_loss" in row)
    assert [row["lr"] for row in train][:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])


def test_metrics_after_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as file:
        for step in (1, 2, 2, 3):
            file.write(step=step)
        with pytest.raises(ValueError, match="JSON"):
            file.write(loss=float("nan"))
    with path.open("a") as cut:
        cut.write('{"step": 4, "lo')
    truncate_after(path, 2)
    with MetricsFile(path) as file:
        file.write(step=3)
    assert [row["step"] for row in read_rows(path)] == [1, 2, 2, 3]


def test_lines_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tiny.recipe(), tmp_path / "shown")
    assert "shown step 6/24  validation loss" in capsys.readouterr().out
    run(tiny.recipe(), tmp_path / "silent", progress=False)
    assert capsys.readouterr().out == ""


def test_torchrun_of_ones_own_gives_the_same_weights(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--recipe", "tiny:recipe", "--engine", "processes", "--name", "joined"]
    command = [*torchrun, "-m", "pipeoptim", "train", *options]
    with processes.Command(command, tmp_path) as started:
        assert started.wait() == 0, started.err
        assert started.out.count("finished at step 24 of 24") == 1
    run(tiny.recipe(), tmp_path / "alone", progress=False)
    assert_same_state(tmp_path / "runs/joined", tmp_path / "alone")
    with processes.Command(command, tmp_path) as again:
        assert again.wait() == 0, again.err
        assert again.err.count("is finished (24 of 24 steps)") == 1


def test_the_hint_to_resume_can_be_pasted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the program is not on the path it is named as it was called."""
    for which, called, hint in (
        (None, ".venv/bin/pipeoptim", ".venv/bin/pipeoptim train --resume --name x"),
        ("/usr/bin/pipeoptim", "/usr/bin/pipeoptim", "pipeoptim train --resume --name x"),
        (None, "script.py", "pipeoptim train --resume --name x"),
    ):
        monkeypatch.setattr("shutil.which", lambda _, found=which: found)
        monkeypatch.setattr(sys, "argv", [called, "train"])
        assert RunDir(Path("runs/x")).resume_command() == hint
