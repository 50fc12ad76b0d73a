"""The benchmark of predictions: what it writes, and that parts of it may be measured one after the other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeoptim.bench.predict import _settings, columns, measure, merged
from pipeoptim.bench.record import Record
from pipeoptim.cli.app import _run
from pipeoptim.errors import ConfigError
from pipeoptim.kernels import available
from pipeoptim.rules import RULES

SMALL = 2e6


def test_every_rule_is_measured() -> None:
    """All classes of torch.optim that have a rule, those of a later torch as well."""
    assert {s.optimizer for s in _settings()} == {cls for cls in RULES if cls.__module__.startswith("torch.optim")}


def test_command_writes_ratios_beside_the_byte_model_and_adds_to_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "predict.json"
    threads = torch.get_num_threads()
    common = ["bench", "predict", "--weights", str(SMALL), "--repeats", "3", "--budget", "0", "--out", str(path), "--add"]
    for optimizer in ("sgd", "AdamW"):
        assert _run([*common, "--threads", "1", "--optimizer", optimizer]) == 0
        assert optimizer.lower() in capsys.readouterr().out.lower()
    assert torch.get_num_threads() == threads
    record = Record.read(path)
    assert {row.settings.get("optimizer") for row in record.rows} == {None, "AdamW", "SGD", "SGD momentum", "SGD nesterov"}
    rows = {row.settings["what"]: row for row in record.rows if row.settings.get("optimizer") == "AdamW"}
    assert {"step", "step, then predict", "predict", "step, displacement"} <= set(rows)
    assert ("fused step and predict" in rows) == available()
    step, then = rows["step"], rows["step, then predict"]
    assert then.settings["ratio"] == pytest.approx(then.median / step.median)
    assert then.settings["model_ratio"] == pytest.approx(11 / 7)
    assert all(len(row.samples) == 3 and row.settings["copy_gigabytes_per_second"] > 0 for row in rows.values())
    head, body = columns(record)
    assert [line[0] for line in body] == ["AdamW", "SGD momentum", "SGD", "SGD nesterov"]
    assert all(len(line) == len(head) for line in body)


def test_what_does_not_belong_together_is_not_mixed() -> None:
    record = measure(SMALL, [1], repeats=3, budget=0, optimizers=["sgd"])
    assert len(merged(record, record).rows) == len(record.rows)
    with pytest.raises(ConfigError, match="another machine, version or number of weights"):
        merged(replace(record, settings={**record.settings, "weights": 1e6}), record)
    with pytest.raises(ConfigError, match="optimizer 'adan' is not measured"):
        measure(SMALL, [1], optimizers=["adan"])
