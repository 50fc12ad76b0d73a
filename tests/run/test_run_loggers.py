"""Every logger that comes along keeps what it is given, in its offline mode, over two sessions of a run."""

from __future__ import annotations

import json
import sqlite3
import time
from dataclasses import replace
from pathlib import Path

import pytest

import noting
import tiny
from pipeoptim.errors import ConfigError
from pipeoptim.telemetry.loggers import LOGGERS, check_installed
from pipeoptim.train import run
from pipeoptim.train.run_loggers import open_loggers
from pipeoptim.train.rundir import RunDir

STEPS = (1, 2, 3)


def value(step: int) -> float:
    """What no other number in a file looks like."""
    return 0.73521875 + step


def of_tensorboard(folder: Path) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {event.step: pytest.approx(event.value) for event in events.Scalars("train/loss")}


def of_wandb(folder: Path) -> dict[int, float]:
    # Another process writes the files; on a busy machine the last row was not there yet when the run had been finished.
    found: dict[int, float] = {}
    until = time.monotonic() + 60
    while len(found) < len(STEPS) and time.monotonic() < until:
        time.sleep(0.05)
        kept = b"".join(path.read_bytes() for path in (folder / "wandb").glob("offline-run-*/*.wandb"))  # one per session
        found = {step: value(step) for step in STEPS if str(value(step)).encode() in kept}
    assert b"train/loss" in kept and (folder / "wandb_run_id").read_bytes() in kept
    return found


def of_mlflow(folder: Path) -> dict[int, float]:
    import mlflow

    found = mlflow.MlflowClient().get_metric_history((folder / "mlflow_run_id").read_text(), "train/loss")
    return {metric.step: metric.value for metric in found}


def of_trackio(folder: Path) -> dict[int, float]:
    (path,) = (folder / "trackio").glob("*.db")
    with sqlite3.connect(path) as base:
        rows = base.execute("SELECT step, metrics FROM metrics").fetchall()
    return {step: json.loads(metrics)["train/loss"] for step, metrics in rows}


@pytest.mark.parametrize("name", LOGGERS)
def test_what_is_logged_is_kept(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        check_installed(name)
    except ConfigError as error:
        pytest.skip(str(error))
    monkeypatch.chdir(tmp_path)
    offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "MLFLOW_TRACKING_URI": f"file:{tmp_path}/mlruns"}
    offline |= {"MLFLOW_ALLOW_FILE_STORE": "true", "TRACKIO_DIR": str(tmp_path / "run" / "trackio")}
    for variable, setting in offline.items():
        monkeypatch.setenv(variable, setting)
    folder = RunDir(tmp_path / "run")
    folder.path.mkdir()
    for session, steps in ((0, (1, 2)), (2, (3,))):
        begun = int(time.time())
        ((found, logger),) = open_loggers(replace(tiny.recipe(), loggers=name), folder, session)
        assert found == name
        for step in steps:
            logger.scalars(step, {"train/loss": value(step), "train/lr": 0.1})
        logger.close()
        while int(time.time()) == begun:  # W&B names the files of a session by the second
            time.sleep(0.02)
    assert globals()[f"of_{name}"](folder.path) == {step: value(step) for step in STEPS}


def test_a_run_tells_its_loggers_what_it_writes_and_survives_one_that_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noting.Memory.opened.clear()
    result = run(replace(tiny.recipe(), loggers="noting:Memory"), tmp_path / "run", progress=False)
    (memory,) = noting.Memory.opened
    assert memory.closed and (memory.run.name, memory.run.start, memory.run.config["steps"]) == ("run", 0, 24)
    told = {(step, name): number for step, name, number in memory.values}
    for row in result.rows():
        for key, name in (("loss", "train/loss"), ("lr", "train/lr"), ("val_loss", "validation/loss")):
            assert key not in row or told[row["step"], name] == row[key]
    failing = replace(tiny.recipe(), loggers="noting:Memory(fails=2)")
    other = run(failing, tmp_path / "failing")
    assert [row.get("loss") for row in other.rows()] == [row.get("loss") for row in result.rows()]
    assert "logger noting:Memory failed at step 2 and gets nothing more (the server is gone)" in capsys.readouterr().out
    assert {step for step, _, _ in noting.Memory.opened[-1].values} == {1} and noting.Memory.opened[-1].closed
