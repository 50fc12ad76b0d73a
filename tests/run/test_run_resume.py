"""A resumed run is the run that never stopped, bit for bit: every method, both engines, after a crash, a kill or Ctrl-C."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import processes
import stage_processes
import tiny
from compare import assert_same_state, final_states, timeless
from pipeoptim.config import Component, TrainConfig
from pipeoptim.errors import ConfigError
from pipeoptim.methods import METHODS
from pipeoptim.train import run


def crash(config: TrainConfig, folder: Path, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run until the data fail at mini-batch ``at``."""
    with monkeypatch.context() as patch:
        patch.setenv("TINY_CRASH_AT", str(at))
        with pytest.raises(OSError, match="disk"):
            run(config, folder, progress=False)


@pytest.mark.parametrize("method", METHODS)
def test_resumed_emulator_equals_one_that_never_stopped(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(tiny.recipe(), method=method, stages=3, microbatches=4)
    run(config, tmp_path / "whole", progress=False)
    crash(config, tmp_path / "halves", 19, monkeypatch)
    assert final_states(tmp_path / "halves")[0] == 16
    assert timeless(tmp_path / "halves")[-1]["step"] == 19
    result = run(config, tmp_path / "halves", resume=True, progress=False)
    assert (result.status, result.step) == ("finished", 24)
    assert_same_state(tmp_path / "whole", tmp_path / "halves")
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "halves")


def test_resumed_run_remembers_what_compression_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(tiny.recipe(), compress="int8", error_feedback="both")
    run(config, tmp_path / "whole", progress=False)
    run(tiny.recipe(), tmp_path / "exact", progress=False)
    crash(config, tmp_path / "halves", 19, monkeypatch)
    run(config, tmp_path / "halves", resume=True, progress=False)
    assert_same_state(tmp_path / "whole", tmp_path / "halves")
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "halves") != timeless(tmp_path / "exact")
    assert TrainConfig.from_json((tmp_path / "whole" / "config.json").read_text()).compress == "int8"


@pytest.mark.parametrize("engine", ["emulator", "processes"])
def test_copies_of_a_tied_weight_are_equal_and_resume(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.tied_weights()
    run(config, tmp_path / "whole", progress=False)
    if engine == "processes":
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)  # they import tiny as well
        run(replace(config, engine="processes"), tmp_path / "halves", progress=False)
    else:
        crash(config, tmp_path / "halves", 19, monkeypatch)
        run(config, tmp_path / "halves", resume=True, progress=False)
    assert_same_state(tmp_path / "whole", tmp_path / "halves")
    step, states = final_states(tmp_path / "halves")
    first, last = (states[k]["module"] for k in (0, config.stages - 1))
    names = [(a, b) for a in first for b in last if a.endswith("weight") and torch.equal(first[a], last[b])]
    assert step == 24 and names, "no weight of the last stage equals one of the first"


def test_the_comparison_would_notice(tmp_path: Path) -> None:
    """Another seed gives other weights: the tests here can fail."""
    run(tiny.recipe(), tmp_path / "one", progress=False)
    run(replace(tiny.recipe(), seed=1), tmp_path / "other", progress=False)
    with pytest.raises(AssertionError, match="differs"):
        assert_same_state(tmp_path / "one", tmp_path / "other")


def test_validating_changes_nothing(tmp_path: Path) -> None:
    run(tiny.recipe(), tmp_path / "often", progress=False)
    run(replace(tiny.recipe(), eval_every=0), tmp_path / "once", progress=False)
    assert_same_state(tmp_path / "often", tmp_path / "once")


def test_depth_does_not_change_the_first_weights(tmp_path: Path) -> None:
    """Synchronous training is the same for any number of stages, if it begins with the same weights."""
    for stages in (1, 4):
        config = replace(tiny.recipe(), model=Component("tiny:plain"), method="gpipe", stages=stages, steps=8)
        run(config, tmp_path / str(stages), progress=False)
    one, four = (final_states(tmp_path / str(stages))[1] for stages in (1, 4))
    weights = {name: value for state in four for name, value in state["module"].items()}
    assert weights.keys() == one[0]["module"].keys()
    for name, value in one[0]["module"].items():
        assert value.equal(weights[name])


def test_longer_needs_a_schedule_that_does_not_depend_on_it(tmp_path: Path) -> None:
    config = tiny.recipe()
    run(config, tmp_path / "cosine", progress=False)
    with pytest.raises(ConfigError, match=r"finished \(24 of 24 steps\); start a new run"):
        run(config, tmp_path / "cosine", resume=True, progress=False)
    with pytest.raises(ConfigError, match="lr_schedule 'cosine' depends"):
        run(replace(config, steps=30), tmp_path / "cosine", resume=True, progress=False)
    constant = replace(config, lr_schedule=replace(config.lr_schedule, target="constant", options={}))
    run(constant, tmp_path / "constant", progress=False)
    with pytest.raises(ConfigError, match="raise --steps"):
        run(constant, tmp_path / "constant", resume=True, progress=False)
    result = run(replace(constant, steps=30), tmp_path / "constant", resume=True, progress=False)
    assert result.step == 30
    assert [row["step"] for row in result.rows() if "loss" in row] == list(range(1, 31))
    with pytest.raises(ConfigError, match="another configuration"):
        run(replace(constant, steps=40, seed=5), tmp_path / "constant", resume=True, progress=False)


def test_killed_stage_is_named_and_the_run_resumes_exactly(tmp_path: Path) -> None:
    """SIGKILL of stage 1 in mid-run; the reference is an undisturbed run on the other engine."""
    where = tmp_path / "runs" / "victim"
    options = ["--recipe", "tiny:slow", "--engine", "processes", "--name", "victim"]
    with processes.train(tmp_path, *options) as command:
        command.wait_for(lambda: (where / "checkpoints" / "step-000040").exists())
        command.wait_for(lambda: timeless(where)[-1]["step"] > 42)
        pids = processes.worker_pids(where)
        os.kill(pids[1], signal.SIGKILL)
        killed, limit = time.monotonic(), 10 * stage_processes.slowness()
        assert command.wait(2 * limit) == 1
        assert time.monotonic() - killed < limit
        assert len(command.err.splitlines()) == 1, command.err
        assert "stage 1 failed: killed by SIGKILL" in command.err
        assert "resume from step 40 with: pipeoptim train --resume --name victim" in command.err
        assert not any(processes.alive(pid) for pid in pids.values())
    with processes.train(tmp_path, "--resume", "--name", "victim") as command:
        assert command.wait() == 0, command.err
        assert "finished at step 120 of 120" in command.out
    run(tiny.slow(), tmp_path / "undisturbed", progress=False)
    assert_same_state(where, tmp_path / "undisturbed")
    assert [r for r in timeless(where) if "loss" in r] == [r for r in timeless(tmp_path / "undisturbed") if "loss" in r]


@pytest.mark.parametrize("engine", ["emulator", "processes"])
def test_ctrl_c_saves_and_says_how_to_resume(engine: str, tmp_path: Path) -> None:
    """With a method that flushes, a stop drains nothing that was not empty: the weights stay those of one run."""
    where = tmp_path / "runs" / "stopped"
    options = ["--recipe", "tiny:slow", "--engine", engine, "--method", "1f1b", "--checkpoint-every", "0", "--name", "stopped"]
    with processes.train(tmp_path, *options) as command:
        command.wait_for(lambda: len(timeless(where)) > 10)
        command.interrupt()
        assert command.wait(30) == 130, command.err
        assert "resume with: pipeoptim train --resume --name stopped" in command.out
    step, _ = final_states(where)
    assert 10 < step < 120
    assert [row["step"] for row in timeless(where)] == list(range(1, step + 1))
    with processes.train(tmp_path, "--resume", "--name", "stopped") as command:
        assert command.wait() == 0, command.err
    run(replace(tiny.slow(), method="1f1b", checkpoint_every=0), tmp_path / "whole", progress=False)
    assert_same_state(where, tmp_path / "whole")
    assert [row["step"] for row in timeless(where) if "loss" in row] == list(range(1, 121))


def test_second_ctrl_c_aborts(tmp_path: Path) -> None:
    """A data set that hangs cannot be waited for."""
    where = tmp_path / "runs" / "hung"
    options = ["--recipe", "tiny:stuck", "--engine", "processes", "--name", "hung"]
    with processes.train(tmp_path, *options) as command:
        command.wait_for(lambda: len(timeless(where)) >= 5)
        pids = processes.worker_pids(where)
        command.interrupt()
        time.sleep(1)
        assert command.process.poll() is None
        command.interrupt()
        assert command.wait(20) == 130
        assert "aborted by SIGINT" in command.err
        assert not any(processes.alive(pid) for pid in pids.values())


def test_workers_do_not_outlive_a_killed_launcher(tmp_path: Path) -> None:
    where = tmp_path / "runs" / "orphans"
    with processes.train(tmp_path, "--recipe", "tiny:stuck", "--engine", "processes", "--name", "orphans") as command:
        command.wait_for(lambda: len(timeless(where)) >= 5)
        pids = processes.worker_pids(where)
        assert len(pids) == 2
        command.process.kill()
        command.wait()
        end = time.monotonic() + 10
        while any(processes.alive(pid) for pid in pids.values()):
            assert time.monotonic() < end
            time.sleep(0.05)
