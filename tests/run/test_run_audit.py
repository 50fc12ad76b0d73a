"""``pipeoptim train --audit``: an update that was computed wrongly is told, and with ``--survive`` the process is replaced."""

from __future__ import annotations

from pathlib import Path

import pytest

import faulty
import processes
from compare import assert_equal_to_undisturbed
from pipeoptim.errors import CorruptionError
from pipeoptim.train import run


def test_a_wrong_update_is_a_fault_that_is_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--recipe", "faulty:recipe", "--engine", "processes", "--survive", "4", "--audit", "1", "--name", "victim"]
    with processes.train(tmp_path, *options) as command:
        assert command.wait(150) == 0, command.err
    assert (tmp_path / "flipped").exists() and command.err.count("was killed by SIGKILL; process") == 1, command.err
    logs = "".join(file.read_text() for file in tmp_path.glob("runs/victim/logs/*/*.err")) + command.err
    assert logs.count("was done twice from the same weights, gradients and optimizer state") == 1, logs

    (tmp_path / "alone").mkdir()
    monkeypatch.chdir(tmp_path / "alone")
    with pytest.raises(
        CorruptionError, match=r"^update 10 of stage 1 .* parameter '3.0.bias' differs in 1 bit: .*resume from step 8 with"
    ):
        run(faulty.replace(faulty.recipe(), audit=2), tmp_path / "stopped", progress=False)
    assert_equal_to_undisturbed(
        tmp_path / "runs" / "victim", faulty.recipe(), tmp_path / "whole"
    )  # the file is there: nothing is flipped
