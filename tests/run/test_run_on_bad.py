"""``pipeoptim train --on-bad``: a mini-batch that is left out is in the metrics and in the result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import tiny
from compare import assert_same_state, timeless
from pipeoptim.config import Component
from pipeoptim.errors import DivergedError, PipeOptimError, StageFailure
from pipeoptim.train import run
from pipeoptim.train.result import RunResult
from pipeoptim.train.rollback import with_rollbacks
from pipeoptim.train.rundir import RunDir, Start

SPOILED = replace(tiny.recipe(), model=Component("tiny:spoiled_model"))


def test_a_mini_batch_that_is_left_out_is_told(tmp_path: Path) -> None:
    with pytest.raises(PipeOptimError, match=r"the loss is nan at step 9, on stage 1; .* resume from step 8 with"):
        run(SPOILED, tmp_path / "stopped", progress=False)
    result = run(replace(SPOILED, on_bad="skip"), tmp_path / "skipped", progress=False)
    assert [row["step"] for row in result.rows() if row.get("skipped")] == [9]  # one forward was the probe of the setup
    assert [stage.skipped for stage in result.stages] == [1, 1]
    assert result.train_loss is not None


def test_a_run_goes_back_and_passes_over_what_was_bad(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On processes; the run that leaves the mini-batch out at once, in one process, has the same bits."""
    monkeypatch.setenv("PYTHONPATH", str(Path(tiny.__file__).parent))
    config = replace(tiny.recipe(), on_bad="rollback", data=Component("tiny:BadBatch", {"bad": 12}))
    run(replace(config, engine="processes"), tmp_path / "back", progress=False)
    told = capfd.readouterr().err
    assert "back to step 8, to leave out mini-batch 12 (counted from 0): the loss is nan at step 13, on stage 1" in told
    run(replace(config, on_bad="skip"), tmp_path / "skipped", progress=False)
    assert_same_state(tmp_path / "back", tmp_path / "skipped")
    rows = timeless(tmp_path / "back")
    assert rows == timeless(tmp_path / "skipped") and [row["step"] for row in rows if row.get("skipped")] == [13]


def test_it_gives_up_where_it_goes_back_again_and_again(tmp_path: Path) -> None:
    directory, bad = RunDir(tmp_path), iter(range(20))
    said: list[str] = []

    def attempt(start: Start) -> RunResult:
        directory.leave_out(n := next(bad), f"mini-batch {n} is bad")
        raise StageFailure("stage 1 failed: the loss is nan")

    with pytest.raises(DivergedError, match="given up, since it has gone back to step 0 10 times"):
        with_rollbacks(directory, attempt, Start, said.append)(Start())
    assert len(said) == 10 and said[0] == "back to step 0, to leave out mini-batch 0 (counted from 0): mini-batch 0 is bad"
    with pytest.raises(StageFailure, match="killed"):  # no mini-batch to blame
        with_rollbacks(directory, lambda _: _raise(StageFailure("killed")), Start, said.append)(Start())


def _raise(error: Exception) -> RunResult:
    raise error
