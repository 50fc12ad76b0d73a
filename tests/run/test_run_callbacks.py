"""What is called at the events of a run, and what the callbacks that come along do."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import noting
import tiny
from compare import timeless
from pipeoptim.checkpoint import load_stage, load_weights, read_meta
from pipeoptim.config import TrainConfig
from pipeoptim.errors import ConfigError
from pipeoptim.telemetry.metrics import read_rows
from pipeoptim.train import run
from pipeoptim.train.callbacks import CALLBACKS, Callback, make_callbacks
from pipeoptim.train.callbacks.early_stopping import EarlyStopping
from pipeoptim.train.events import RunEvents
from pipeoptim.train.rundir import FinishedError
from processes import TRAIN, Command


def test_every_event_comes_once_in_order_and_changes_nothing(tmp_path: Path) -> None:
    note = noting.Note()
    result = run(tiny.recipe(), tmp_path / "noted", progress=False, callbacks=[note])
    plain = run(tiny.recipe(), tmp_path / "plain", progress=False)
    assert timeless(result.run_dir) == timeless(plain.run_dir)
    seen = {kind: [event[1:] for event in note.seen if event[0] == kind] for kind, *_ in note.seen}
    rows = plain.rows()
    assert seen["step"] == [(row["step"], row["loss"]) for row in rows if "loss" in row]
    figures = [(row.pop("step"), row) for row in rows if "val_loss" in row]
    assert seen["eval"] == figures and len(figures) == 4
    assert seen["checkpoint"] == [(8, True), (16, True), (24, True)]
    assert seen["update"] == sorted(seen["update"], key=lambda event: event[1]) and len(seen["update"]) == 48
    assert (seen["start"], seen["stop"]) == ([(0, True)], [(24, True)])
    order = [event[:2] for event in note.seen if event[0] != "update"]
    assert order.index(("eval", 24)) < order.index(("checkpoint", 24)) < order.index(("stop", 24)) == len(order) - 1


def test_a_run_on_processes_ends_where_a_callback_in_one_of_them_says(tmp_path: Path) -> None:
    named = ["--callbacks", "noting:Note(end=10)", "--loggers", "noting:Memory(fails=3)", "--recipe", "tiny:steady"]
    with Command([*TRAIN, *named, "--engine", "processes", "--steps", "200", "--name", "a"], tmp_path) as command:
        assert command.wait() == 0, command.err
        assert "that was enough" in command.out
        assert "logger noting:Memory failed at step 3" in command.out
    notes = sorted((path.read_text().splitlines() for path in (tmp_path / "runs" / "a").glob("events-*.txt")), key=len)
    first, last = notes if "start 0 True" in notes[1] else reversed(notes)
    done = int(last[-1].split()[1])
    assert last[-1] == f"stop {done} True" and 10 <= done < 16
    assert [line for line in last if line.startswith("step")][-1].startswith(f"step {done} ")
    assert {line.split()[0] for line in first} == {"start", "update"}
    assert first[-1] == f"update 0 {done}" and f"update 1 {done}" in last


def early(**changed: Any) -> TrainConfig:
    callbacks = "early_stopping(patience=2, min_delta=10.0), best_checkpoint"
    return replace(
        tiny.steady(), callbacks=callbacks, eval_every=4, checkpoint_every=4, keep_checkpoints=1, export=True, **changed
    )


def test_early_stopping_ends_a_run_and_the_best_checkpoint_is_kept_and_exported(tmp_path: Path) -> None:
    result = run(early(), tmp_path / "run", progress=False)
    assert (result.status, result.step) == ("finished", 12), "the first validation, and two no better by 10"
    assert "early stopping at step 12: val_loss no better for 2 validations (best" in result.reason
    with pytest.raises(FinishedError, match="ended .early stopping"):
        run(early(), tmp_path / "run", resume=None, progress=False)
    check_best(tmp_path / "run")
    longer = run(early(), tmp_path / "run", resume=True, progress=False)
    assert (longer.step, longer.reason[:27]) == (16, "early stopping at step 16: "), "it counts on where it was"
    check_best(tmp_path / "run")


@pytest.mark.parametrize(("saving", "crash"), [("background", None), ("wait", None), ("background", "5")])
def test_the_best_checkpoint_is_kept_though_it_is_not_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saving: str, crash: str | None
) -> None:
    before = tiny.recipe()
    config = replace(
        before,
        callbacks="best_checkpoint",
        optimizer=before.optimizer.with_options(lr=0.9),
        steps=9,
        eval_every=3,
        checkpoint_every=3,
        keep_checkpoints=1,
        export=True,
        saving=saving,
    )
    if crash:  # checkpoint 3 is complete, and nobody was told of it
        with monkeypatch.context() as patch:
            patch.setenv("TINY_CRASH_AT", crash)
            with pytest.raises(OSError, match="the disk of the data is gone"):
                run(config, tmp_path / "run", progress=False)
        assert not (tmp_path / "run" / "best").exists()
    run(config, tmp_path / "run", resume=crash is not None, progress=False)
    check_best(tmp_path / "run")
    assert read_meta(tmp_path / "run" / "best").step == 3


def check_best(folder: Path) -> None:
    rows = {row["step"]: row["val_loss"] for row in read_rows(folder / "metrics.jsonl") if "val_loss" in row}
    best = min(rows, key=rows.__getitem__)
    assert read_meta(folder / "best").step == best
    model = tiny.model()
    load_weights(model, folder / "model")
    kept = [value for k in (0, 1) for value in load_stage(folder / "best", k)["module"].values()]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), kept, strict=True))


@pytest.mark.parametrize(
    ("mode", "values", "stops"),
    [
        ("min", [3.0, 2.0, 1.99, 1.5, 1.5, 1.45], 6),
        ("max", [1.0, 2.0, 1.0, math.nan], 4),
        ("min", [math.nan, math.inf], 2),
        ("min", [3.0, 2.0, 1.0, 0.5, 0.2], 0),
    ],
)
def test_patience_counts_validations_that_are_no_better(mode: str, values: list[float], stops: int) -> None:
    class View:
        start, told = 0, None

        def stop(self, reason: str) -> None:
            self.told = self.told or reason

    callback, view = EarlyStopping(patience=2, monitor="val_x", mode=mode, min_delta=0.1), View()
    ended = []
    for n, value in enumerate(values, start=1):
        callback.on_eval(view, n, {"val_x": value})
        ended += [n] if view.told else []
    assert ended[:1] == ([stops] if stops else [])


def test_nobody_listens_and_nothing_is_called() -> None:
    assert RunEvents().update_hook is None
    assert RunEvents([Callback()]).update_hook is None
    assert RunEvents([noting.Note()]).update_hook is not None


@pytest.mark.parametrize("name", CALLBACKS)
def test_those_that_come_along_explain_themselves(name: str) -> None:
    (made,) = make_callbacks(name)
    assert type(made) is CALLBACKS[name] and (type(made).__doc__ or "").strip()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"callbacks": "early_stoping"}, "unknown callback 'early_stoping'; did you mean 'early_stopping'"),
        ({"callbacks": "early_stopping(patient=3)"}, "patience"),
        ({"callbacks": "early_stopping(patience=0)"}, "patience is 0"),
        ({"callbacks": "early_stopping(mode='best')"}, "mode is 'best'"),
        ({"callbacks": "early_stopping(patience=int)"}, "cannot be read"),
        ({"callbacks": "tiny:model"}, "subclass of pipeoptim.train.callbacks.Callback"),
        (
            {"callbacks": "best_checkpoint(monitor='val_bleu')", "checkpoint_every": 6},
            "monitor is 'val_bleu', but .* val_loss, val_accuracy",
        ),
        ({"loggers": "tensorbord"}, "unknown logger 'tensorbord'"),
        ({"loggers": "noting:Memory(fail=3)"}, "fails"),
        ({"loggers": "noting:Memory,noting:Memory"}, "each logger once"),
    ],
)
def test_what_is_wrong_is_said(options: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        run(replace(tiny.recipe(), **options), tmp_path / "run", progress=False)


def test_objects_are_for_this_process(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="object of this process"):
        run(replace(tiny.recipe(), engine="processes"), tmp_path / "run", callbacks=[noting.Note()])
    with pytest.raises(ConfigError, match="must be a list of"):
        run(tiny.recipe(), tmp_path / "run", callbacks=[print])
