"""The account of a run: it adds up over sessions, also failed ones, and is held against an estimate."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tiny
from compare import timeless
from pipeoptim.compare.report import write_run_report
from pipeoptim.errors import ConfigError
from pipeoptim.train import energy, run
from pipeoptim.train.callbacks import Callback
from pipeoptim.train.callbacks.cost_meter import CostMeter, _compared


class Broken(Callback):
    def on_step(self, run: Any, step: int, loss: float) -> None:
        if step == 20:
            raise RuntimeError("out of money")


def account(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "cost.json").read_text())
    return found


def test_the_account_goes_on_over_sessions_that_ended_and_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    meter = "pipeoptim.train.callbacks.cost_meter"
    now = [0.0]
    monkeypatch.setattr(f"{meter}.time.monotonic", lambda: now[0])

    class Clock(Callback):
        def on_step(self, run: Any, step: int, loss: float) -> None:
            now[0] += 3600 / 4

    estimate = tmp_path / "estimate.json"
    estimate.write_text(json.dumps({"places": {"own": {"total USD": [10, 12, 20], "kWh": None, "hours": [5, 6, 7]}}}))
    named = f"cost_meter(usd_per_hour=2.0, watts=500, estimate={str(estimate)!r}, place='own')"
    config = replace(tiny.recipe(), callbacks=named)
    assert config.steps == 24 and config.checkpoint_every == 8
    folder = tmp_path / "run"
    with pytest.raises(RuntimeError, match="out of money"):
        run(config, folder, callbacks=[Broken(), Clock()])
    failed = account(folder)
    assert failed["sessions"] == 1 and failed["hours"] == pytest.approx(19 / 4)  # kept at step 20, before the failure
    result = run(config, folder, resume=True, callbacks=[Clock()])
    found = account(folder)
    assert found["hours"] == pytest.approx(19 / 4 + 8 / 4)  # from step 16 again
    assert (found["USD"], found["kWh"], found["sessions"]) == (pytest.approx(13.5), pytest.approx(3.375, abs=1e-3), 2)
    told = capsys.readouterr().out
    assert "13.500 USD, 3.375 kWh, 6.750 device hours (1 device) so far" in told
    assert (
        "estimated 12 USD (10 to 20), actual 13.5: +12.5%" in told and "estimated 6 hours (5 to 7), actual 6.75: +12.5%" in told
    )
    assert found["estimated"]["USD"] == [10, 12, 20]
    page = write_run_report(folder).read_text()
    assert "<td>13.5</td><td>12 (10 to 20)</td>" in page and "1 device, 2 sessions." in page
    plain = run(tiny.recipe(), tmp_path / "plain", progress=False)
    assert timeless(result.run_dir) == timeless(plain.run_dir), "the meter changes nothing"


def test_counters_begin_anew_and_their_parts_do_not_count_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, label in (("intel-rapl:0", "package-0"), ("intel-rapl:1", "package-1"), ("intel-rapl:0:0", "core")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "name").write_text(label)
        (tmp_path / name / "max_energy_range_uj").write_text("999999999")
        (tmp_path / name / "energy_uj").write_text("900000000")
    monkeypatch.setattr(energy, "_readable_gpus", list)
    counters = energy.PowerCounters(tmp_path)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("100000000")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("950000000")
    assert counters.kwh() == pytest.approx((200 + 50) / 3.6e6)
    assert counters.kwh() == pytest.approx(250 / 3.6e6)
    assert energy.PowerCounters(tmp_path / "none").kwh() is None


def test_what_is_unknown_stays_unknown_and_bad_input_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _compared({"USD": None, "kWh": 1.0, "hours": 2.0}, {"USD": [1, 2, 3], "kWh": None, "hours": [1, None, 2]}) == []
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    damaged = tmp_path / "damaged.json"
    damaged.write_text('{"places": {"on demand": 3}}')
    for options, message in (
        ({"usd_per_hour": -1}, "usd_per_hour is -1, must be a number from 0"),
        ({"watts": float("nan")}, "watts is nan"),
        ({"energy": "guess"}, "energy is 'guess', must be one of counters, codecarbon"),
        ({"energy": "codecarbon", "watts": 3}, "leave one of them out"),
        ({"estimate": str(tmp_path / "none.json")}, "make it with pipeoptim cost --out"),
        ({"estimate": str(damaged)}, "damaged"),
        ({"estimate": str(damaged), "place": "moon"}, "place is 'moon', must be one of those in"),
    ):
        with pytest.raises(ConfigError, match=message):
            CostMeter(**options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"pip install 'pipeoptim\[energy\]'"):
        run(replace(tiny.recipe(), callbacks="cost_meter(energy='codecarbon')"), tmp_path / "run", progress=False)
