"""The benchmark of predictions: what it writes, and that parts of it may be measured one after the other."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeoptim.bench import predict
from pipeoptim.bench.goals import goals
from pipeoptim.bench.predict import _settings, columns, measure, merged
from pipeoptim.bench.record import Record
from pipeoptim.bench.timer import CYCLES, MOST_CYCLES, GpuTimer, WorkTimer
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


def test_every_number_of_threads_measures_the_fused_step_and_goals_read_it(tmp_path: Path) -> None:
    record = measure(SMALL, [1, 2], repeats=3, budget=0, optimizers=["adam", "asgd"])
    fused = [row for row in record.rows if row.settings["what"] == "fused step and predict"]
    assert [row.settings["threads"] for row in fused] == ([1, 2] if available() else [])
    record.write(tmp_path / "predict.json")
    found = {goal.what: goal for goal in goals(tmp_path)}
    if fused:
        goal = found["Adam, step and prediction on one thread, over torch's step"]
        assert goal.value == fused[0].settings["ratio"] and goal.most == 1.15
    (dearest,) = [goal for what, goal in found.items() if "without a fused step" in what]
    rows = [row.settings for row in record.rows if row.settings.get("optimizer") == "ASGD" and row.settings["threads"] == 1]
    ratios = {row["what"]: row["ratio"] for row in rows}
    assert not fused or "ASGD" in dearest.what
    assert not fused or dearest.value == min(ratios["step, then predict"], ratios["step, displacement"])


def test_what_does_not_belong_together_is_not_mixed() -> None:
    record = measure(SMALL, [1], repeats=3, budget=0, optimizers=["sgd"])
    assert len(merged(record, record).rows) == len(record.rows)
    with pytest.raises(ConfigError, match="another machine, version or number of weights"):
        merged(replace(record, settings={**record.settings, "weights": 1e6}), record)
    with pytest.raises(ConfigError, match="optimizer 'adan' is not measured"):
        measure(SMALL, [1], optimizers=["adan"])


# ---- on a GPU -----------------------------------------------------------------------------------------------------------------


class AsOnGpu(WorkTimer):
    """The CPU in the place of a GPU."""

    on_gpu = True


def test_what_is_measured_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(predict, "timer_of", lambda device: AsOnGpu())
    monkeypatch.chdir(tmp_path)
    common = ["bench", "predict", "--weights", str(SMALL), "--repeats", "3", "--budget", "0", "--optimizer"]
    assert _run([*common, "AdamW", "--device", "cuda"]) == 0
    assert "predict_cuda.json" in capsys.readouterr().out
    record = Record.read(tmp_path / "benchmarks/results/predict_cuda.json")
    assert record.settings["device"] == "cuda"
    rows = {row.settings["what"]: row for row in record.rows}
    fused = rows["step"].settings["torch_step"] == "fused"
    assert ("predict, counts on the host" in rows) == fused
    assert {"copy", "step, then predict", "predict", "predict, without Triton", "step, displacement"} <= set(rows)
    for name, row in rows.items():
        assert len(row.samples) == 3
        assert name == "copy" or (row.settings["host_ms"] > 0 and row.settings["late"] is False)
    head, ((name, *cells),) = columns(record)
    assert name == "AdamW" and len(cells) + 1 == len(head)
    alone = rows["predict"].settings
    share = alone["gigabytes_per_second"] / rows["copy"].settings["gigabytes_per_second"]
    assert cells[head.index("prediction alone") - 1] == f"{alone['gigabytes_per_second']:.0f} GB/s, {share:.0%} of a copy"
    on_cpu = replace(record, settings={name: value for name, value in record.settings.items() if name != "device"})
    with pytest.raises(ConfigError, match="of device cuda"):
        merged(record, on_cpu)
    monkeypatch.setattr(predict, "measure", lambda *settings: on_cpu)
    assert _run([*common, "AdamW"]) == 0
    assert Record.read(tmp_path / "benchmarks/results/predict.json").settings == on_cpu.settings


@pytest.mark.parametrize(
    ("device", "says"),
    [("tpu", "must be cpu, cuda or cuda:N"), ("meta", "must be cpu"), ("cuda:99", "torch .* finds [0-9]+ GPUs here")],
)
def test_a_device_that_is_not_there_is_refused(device: str, says: str) -> None:
    with pytest.raises(ConfigError, match=f"device is '{device}'.*{says}"):
        measure(SMALL, [1], optimizers=["sgd"], device=device)


class Simulated:
    """A GPU of which time is known: what is queued runs in order, one cycle a nanosecond."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = self.free = 0.0
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.queue(0.0, 1e-9 * cycles))
        monkeypatch.setattr(torch.cuda, "Event", self.event)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())

    def queue(self, calling: float, running: float) -> None:
        self.host += calling
        self.free = max(self.free, self.host) + running

    def event(self, enable_timing: bool) -> Any:
        gpu = self

        class Event:
            at = -1.0

            def record(self) -> None:
                self.at = max(gpu.free, gpu.host)

            def query(self) -> bool:
                return self.at <= gpu.host

            def synchronize(self) -> None:
                gpu.host = max(gpu.host, self.at)

            def elapsed_time(self, end: Any) -> float:
                return 1e3 * (end.at - self.at)

        return Event()

    def work(self, launches: int, calling: float, running: float) -> Callable[[], None]:
        return lambda: [self.queue(calling, running) for _ in range(launches)] and None


def test_a_gpu_is_timed_without_the_time_that_python_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Simulated(monkeypatch)
    timer = GpuTimer(torch.device("cuda"))
    asleep = 1e-9 * CYCLES
    quick, slow = gpu.work(10, 1e-4, 1e-5), gpu.work(10, asleep / 5, 1e-5)
    for work in (quick, slow, quick):
        assert timer.seconds(work) == pytest.approx(1e-4)  # 10 launches of 10 us, however long they take to queue
        assert not timer.late
    stuck = gpu.work(10, 1e-9 * MOST_CYCLES, 1e-5)
    assert timer.seconds(stuck) > 1e-9 * MOST_CYCLES  # the host is never ahead, so what it takes is what there is
    assert timer.late
