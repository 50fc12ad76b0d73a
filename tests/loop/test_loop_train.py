"""Clipping, autocast and monitoring through ``pipeoptim.train``, with the emulator and with processes."""

import json
from dataclasses import replace

import pytest

from pipeoptim.compare.report import write_run_report
from pipeoptim.config import Component, TrainConfig
from pipeoptim.errors import ConfigError
from pipeoptim.telemetry.summary import print_summary
from pipeoptim.train import run


def config(**changes):
    base = TrainConfig(
        recipe="digits",
        model=Component("pipeoptim_zoo.models.digits_cnn:digits_cnn", {"width": 4}),
        data=Component("pipeoptim_zoo.data.digits:digits"),
        optimizer=Component("adam", {"lr": 0.01}),
        lr_schedule=Component("cosine", {"warmup": 3}),
        stages=3,
        microbatches=2,
        batch_size=16,
        steps=24,
        eval_every=8,
        eval_batches=2,
        checkpoint_every=12,
        clip=0.5,
        clip_scope="global",
        autocast="bfloat16",
        monitor_every=4,
        tensorboard=True,
    )
    return replace(base, **changes)


def rows(result, key):
    return [row for row in result.rows() if key in row]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return run(config(), tmp_path_factory.mktemp("emulated") / "run", progress=False)


def test_processes_write_the_same_rows(emulated, tmp_path):
    theirs = run(config(engine="processes"), tmp_path / "run", progress=False)
    for key in ("prediction", "val_loss"):
        assert rows(emulated, key) == rows(theirs, key)
    assert [row["loss"] for row in rows(emulated, "loss")] == [row["loss"] for row in rows(theirs, "loss")]
    assert [s.prediction_error for s in emulated.stages] == [s.prediction_error for s in theirs.stages]


def test_rows_summary_and_tensorboard(emulated, capsys):
    measured = rows(emulated, "prediction")
    assert [row["step"] for row in measured] == [4, 8, 12, 16, 20, 24]
    assert {entry["stage"] for row in measured for entry in row["prediction"]} == {0, 1}
    assert all(0 < entry["relative_error"] < 3 for entry in measured[-1]["prediction"])
    errors = [s.prediction_error for s in emulated.stages]
    assert errors[0] > 0 and errors[1] > 0 and errors[2] is None
    print_summary(emulated, 24, "as it is")
    assert "prediction error" in capsys.readouterr().out

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(emulated.run_dir / "tensorboard"))
    events.Reload()
    names = events.Tags()["scalars"]
    assert {"train/loss", "train/lr", "validation/loss", "prediction/relative_error/stage0_group0"} <= set(names)
    assert [event.step for event in events.Scalars("prediction/cosine/stage1_group0")] == [8, 12, 16, 20, 24]
    losses = [event.value for event in events.Scalars("train/loss")]
    assert losses == pytest.approx([row["loss"] for row in rows(emulated, "loss")], rel=1e-6)


def test_the_report_shows_stage_and_group(emulated):
    """The means are those of the rows, every measurement once."""
    text = write_run_report(emulated.run_dir).read_text()
    assert "<h2>Weight prediction</h2>" in text
    for stage in (0, 1):
        entries = {e["version"]: e for row in rows(emulated, "prediction") for e in row["prediction"] if e["stage"] == stage}
        errors = [e["relative_error"] for e in entries.values() if e["relative_error"] is not None]
        mean = f"{sum(errors) / len(errors):.2f}"
        assert f"<tr><th scope=row>{stage}</th><td>0</td><td>{mean}</td><td>{mean}</td>" in text
        assert len(errors) >= 5


def test_monitoring_changes_no_loss_and_is_off_by_default(emulated, tmp_path):
    plain = run(config(monitor_every=0, tensorboard=False), tmp_path / "run", progress=False)
    assert rows(plain, "prediction") == []
    assert "Weight prediction" not in write_run_report(plain.run_dir).read_text()
    assert not (plain.run_dir / "tensorboard").exists()
    assert [row["loss"] for row in rows(plain, "loss")] == [row["loss"] for row in rows(emulated, "loss")]


def test_a_resumed_run_repeats_the_rows(emulated, tmp_path):
    path = tmp_path / "run"
    run(config(lr_schedule=Component("constant"), steps=12), path, progress=False)
    more = run(config(lr_schedule=Component("constant")), path, resume=True, progress=False)
    whole = run(config(lr_schedule=Component("constant")), tmp_path / "whole", progress=False)
    assert [row["step"] for row in rows(more, "prediction")] == [row["step"] for row in rows(whole, "prediction")]
    assert [row["loss"] for row in rows(more, "loss")] == [row["loss"] for row in rows(whole, "loss")]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"clip": -1.0}, "clip is -1.0"),
        ({"clip_scope": "all"}, "must be one of stage, global"),
        ({"stages": 4, "microbatches": 2}, "set microbatches to 3 or more"),
        ({"autocast": "int8"}, "autocast is 'int8'"),
        ({"monitor_every": -2}, "monitor_every is -2"),
    ],
)
def test_bad_input_is_refused(changes, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        run(config(**changes), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_the_configuration_round_trips():
    text = config().to_json()
    assert TrainConfig.from_json(text) == config()
    assert TrainConfig.from_json(json.dumps({**json.loads(text), "clip": 1})).clip == 1.0
    with pytest.raises(ConfigError, match="tensorboard is 'yes'"):
        TrainConfig.from_json(json.dumps({**json.loads(text), "tensorboard": "yes"}))
