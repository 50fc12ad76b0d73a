"""``pipeoptim watch`` shows of a run what its files say, while they grow."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

import tiny
from pipeoptim.cli.app import _run
from pipeoptim.errors import ConfigError
from pipeoptim.telemetry.watch_view import picture
from pipeoptim.telemetry.watched_run import CURVE, WatchedRun
from pipeoptim.train import run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watch") / "run"
    run(replace(tiny.steady(), steps=60, monitor_every=5), folder, progress=False)
    return folder


def shown(watched: WatchedRun, width: int = 100) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(picture(watched, [1, None], width))
    return console.export_text()


def test_the_command_shows_a_run_that_has_ended(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["watch", str(trained), "--once"]) == 0
    text = capsys.readouterr().out
    result = json.loads((trained / "result.json").read_text())
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert "run: finished  (pipeoptim, 2 stages, engine emulator)" in text and "60/60" in text and "left" not in text
    assert f"loss {result['train_loss']:.4f}" in text and f"validation {result['val_loss']:.4f} at step 60" in text
    timing = [row["timing"] for row in rows if "timing" in row][-1]
    assert all(f"{1e3 * stage['computing']:.2f}" in text for stage in timing)
    error = [row["prediction"] for row in rows if "prediction" in row][-1][0]["relative_error"]
    first = next(line.split() for line in text.splitlines() if line.strip().startswith("0 "))
    assert first[1] == "1" == str(result["stages"][0]["gap"]) and first[-1] == f"{error:.3f}"


def test_looks_in_between_add_up_and_a_resumed_run_goes_back(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((trained / "config.json").read_text())
    metrics, text = tmp_path / "metrics.jsonl", (trained / "metrics.jsonl").read_bytes()
    watched, whole = WatchedRun(tmp_path), WatchedRun(trained)
    assert watched.status() == "not started" and "nothing is trained yet" in shown(watched)
    for end in range(0, len(text), 1000):  # in the middle of lines as well
        metrics.write_bytes(text[:end])
        watched.look()
    metrics.write_bytes(text)
    watched.look()
    whole.look()
    assert [vars(watched)[name] for name in ("losses", "recent", "validations", "prediction", "timing")] == [
        vars(whole)[name] for name in ("losses", "recent", "validations", "prediction", "timing")
    ]
    metrics.write_bytes(b"".join(text.splitlines(keepends=True)[:10]))
    watched.look()
    assert watched.step == len(watched.losses) == 8
    left = (60 - 8) * 8 / watched.recent[-1]["samples_per_second"]
    assert watched.seconds_left == pytest.approx(left)
    assert "?" in shown(watched) and all(len(line) <= 60 for line in shown(watched, 60).splitlines())


def test_states_of_a_run(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((trained / "config.json").read_text())
    watched, lock, here = WatchedRun(tmp_path), tmp_path / "lock", socket.gethostname()
    lock.write_text(f"process {os.getpid()} on {here}\n")
    assert watched.status() == "starting" and not watched.ended
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "samples_per_second": 5.0}\nno JSON\n')
    watched.look()
    assert watched.status() == "running" and "7:52" not in shown(watched) and "1:34 left" in shown(watched)
    lock.write_text(f"process {2**30} on {here}\n")
    assert watched.status().startswith("ended without a result") and watched.ended
    lock.write_text("process 1 on elsewhere\n")
    assert watched.status().startswith("running on elsewhere, last row 0 s ago")
    (tmp_path / "result.json").write_text('{"status": "stopped", "stopped_by": "SIGTERM"}')
    assert watched.status() == "stopped (SIGTERM)" and watched.ended


def test_a_long_curve_is_thinned_out_evenly(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((trained / "config.json").read_text())
    count = 3 * CURVE
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {n + 1}, "loss": {n}}}\n' for n in range(count)))
    watched = WatchedRun(tmp_path)
    watched.look()
    assert watched.losses == [float(n) for n in range(0, count, 4)] and len(watched.losses) <= CURVE


def test_another_machine_is_reached_by_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []

    def execv(path: str, command: list[str]) -> None:
        called.append([Path(path).name, *command])
        raise KeyboardInterrupt

    ssh = tmp_path / "ssh"
    ssh.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "execv", execv)
    assert _run(["watch", "me@cluster:my runs/a"]) == 130
    assert called == [["ssh", "ssh", "-t", "--", "me@cluster", "pipeoptim watch 'my runs/a' --every 1"]]
    ssh.unlink()
    assert _run(["watch", "cluster:a", "--once"]) == 2


def test_what_is_no_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no run in"):
        WatchedRun(tmp_path)
    assert _run(["watch", str(tmp_path / "nothing")]) == 2
    assert _run(["watch", str(tmp_path), "--every", "0"]) == 2
