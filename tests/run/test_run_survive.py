"""Processes that die are replaced while the others wait, and the run ends with the bits of one that was never disturbed."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import dying
import processes
import tiny
from compare import assert_equal_to_undisturbed
from pipeoptim.engine.survival import Survival
from pipeoptim.errors import ConfigError
from pipeoptim.train import run
from pipeoptim.train.checks import check


def test_stages_killed_in_a_forward_a_backward_an_update_and_an_evaluation(tmp_path: Path) -> None:
    script = (
        "import dataclasses, dying, pipeoptim.train\n"
        "config = dataclasses.replace(dying.recipe(), engine='processes', survive=4)\n"
        "pipeoptim.train.run(config, 'runs/victim', progress=False)"
    )
    with processes.Command([sys.executable, "-c", script], tmp_path) as command:
        assert command.wait(150) == 0, command.err
    where = tmp_path / "runs" / "victim"
    died = {path.name.removeprefix("died-") for path in tmp_path.glob("died-*")}
    assert died == {"forward", "backward", "update", "evaluation"}
    (listing,) = where.glob("logs/*/processes.json")
    told = json.loads(listing.read_text())
    assert sorted(one["stage"] for one in told["replaced"]) == ["stage 0", "stage 1", "stage 2", "stage 2"]
    assert command.err.count("was killed by SIGKILL; process") == 4, command.err
    for process in told["processes"].values():
        assert not Path(f"/proc/{process}").exists()
    assert_equal_to_undisturbed(where, dying.recipe(), tmp_path / "whole")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"engine": "emulator"}, "survive is 8, but engine is 'emulator': there is no process to replace"),
        ({"threads": 2}, "threads is 2: an image"),
        ({"stages": 4, "chunks": 2}, "chunks is 2: interleaved"),
        ({"replicas": 2}, "replicas is 2"),
        ({"slack": "auto"}, "slack is 'auto'"),
        ({"checksums": False}, "checksums is False: messages between processes of one machine carry none"),
        ({"trace": True}, "trace is True"),
        (
            {"export": True},
            "export is True: .* give --no-export, and when the run has ended: pipeoptim export RUN",
        ),
    ],
)
def test_what_cannot_survive_is_refused(changed: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        check(replace(tiny.recipe(), **{"engine": "processes", "survive": 8, **changed}))  # type: ignore[arg-type]


def test_torchrun_which_replaces_nobody_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match=r"survive is 8, but nobody would replace this process .* by pipeoptim train --survive"
    ):
        Survival(8, k=0, depth=2)  # as Schedule(survive=8) in a script
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"survive is 8, but torchrun's agent ends all .* give --max-restarts to torchrun"):
        run(replace(tiny.recipe(), engine="processes", survive=8), tmp_path / "run", progress=False)
    assert not any(tmp_path.iterdir())


def test_no_checksums_are_left_out_where_there_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="checksums is False, but without torchrun all processes are on this machine"):
        run(replace(tiny.recipe(), engine="processes", checksums=False), tmp_path / "run", progress=False)
    assert not any(tmp_path.iterdir())
