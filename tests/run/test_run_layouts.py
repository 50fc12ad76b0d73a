"""Stages spread over processes in other ways, and runs that go on with another number of stages."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import processes
import tiny
from compare import assert_same_state, final_states, timeless
from exactly import assert_equal
from pipeoptim.config import Component, TrainConfig
from pipeoptim.errors import ConfigError
from pipeoptim.train import recut, run
from pipeoptim.train.checks import check
from pipeoptim.train.rundir import RunDir


def plain(**changes: Any) -> TrainConfig:
    return replace(tiny.steady(), model=Component("tiny:plain"), **changes)


def weights_and_optimizer(states: list[dict[str, Any]]) -> list[Any]:
    """In the order of the model, whatever its stages."""
    weights = [value for state in states for value in state["module"].values()]
    moments = [state["optimizer"]["state"][n] for state in states for n in sorted(state["optimizer"]["state"])]
    return [weights, moments, states[0]["version"], states[0]["scheduler"]]


def test_a_chunked_run_is_the_same_in_processes_and_resumes_in_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(processes.HERE), prepend=":")
    config = replace(tiny.recipe(), stages=4, chunks=2, microbatches=2, overlap=True, monitor_every=6)
    whole = run(config, tmp_path / "whole", progress=False)
    run(replace(config, chunks=1), tmp_path / "other", progress=False)
    with pytest.raises(AssertionError, match="differs"):
        assert_same_state(tmp_path / "whole", tmp_path / "other")
    run(config, tmp_path / "halves", progress=False)
    shutil.rmtree(tmp_path / "halves" / "checkpoints" / "step-000024")
    result = run(replace(config, engine="processes", trace=True), tmp_path / "halves", resume=True, progress=False)
    assert_same_state(tmp_path / "whole", tmp_path / "halves")
    assert [s.gap for s in result.stages] == [s.gap for s in whole.stages]


def test_replicas_train_as_one_on_the_whole_mini_batch_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(processes.HERE), prepend=":")
    config = plain(microbatches=2)
    run(config, tmp_path / "one", progress=False)
    beside = replace(config, replicas=2, stages=2, engine="processes", trace=True, monitor_every=6)
    run(beside, tmp_path / "two", progress=False)
    for one, two in zip(*(final_states(tmp_path / name)[1] for name in ("one", "two")), strict=True):
        for name, value in one["module"].items():
            torch.testing.assert_close(two["module"][name], value, rtol=1e-4, atol=1e-5)
    rows, theirs = timeless(tmp_path / "one"), [row for row in timeless(tmp_path / "two") if "prediction" not in row]
    assert [row.get("loss", 0) for row in theirs] == pytest.approx([row.get("loss", 0) for row in rows], rel=1e-4)
    shutil.copytree(tmp_path / "two", tmp_path / "halves")
    shutil.rmtree(tmp_path / "halves" / "checkpoints" / "step-000024")
    result = run(beside, tmp_path / "halves", resume=True, progress=False)
    assert_same_state(tmp_path / "two", tmp_path / "halves")
    assert [s.stage for s in result.stages] == [0, 1]
    logs = {path.name for path in (tmp_path / "two" / "logs" / "launch-1").glob("*.err")}
    assert logs == {f"stage-{k}-replica-{r}.err" for k in (0, 1) for r in (0, 1)}


def test_recomputed_blocks_change_nothing_on_the_forwards_weights(tmp_path: Path) -> None:
    config = replace(tiny.recipe(), stages=3, steps=12)
    for recompute in ("", "forward", "backward"):
        run(replace(config, recompute=recompute), tmp_path / f"async{recompute}", progress=False)
    assert_same_state(tmp_path / "async", tmp_path / "asyncforward", memory=False)  # which keeps weights until their backward
    with pytest.raises(AssertionError, match="differs"):
        assert_same_state(tmp_path / "async", tmp_path / "asyncbackward", memory=False)


def test_uneven_micro_batches_of_a_flushed_run_are_the_whole_mini_batch(tmp_path: Path) -> None:
    for name, changes in (("whole", {}), ("uneven", {"microbatches": 3, "uneven": True})):
        run(plain(method="gpipe", steps=8, **changes), tmp_path / name, progress=False)
    for one, other in zip(*(final_states(tmp_path / name)[1] for name in ("whole", "uneven")), strict=True):
        for name, value in one["module"].items():
            torch.testing.assert_close(other["module"][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon_adamw"])
def test_a_run_goes_on_with_another_number_of_stages(optimizer: str, tmp_path: Path) -> None:
    options = {"lr": 0.01} | ({"momentum": 0.9} if optimizer == "sgd" else {})
    config = plain(method="gpipe", optimizer=Component(optimizer, options), stages=2, steps=16)
    for stages in (2, 4):
        run(replace(config, stages=stages), tmp_path / f"run{stages}", progress=False)
    longer = replace(config, stages=4, steps=24)
    new = recut(RunDir(tmp_path / "run2"), longer)
    assert new.path == tmp_path / "run2-4-stages"
    assert final_states(new.path)[0] == 16
    if optimizer != "muon_adamw":  # its state is that of two optimizers
        before, after = (weights_and_optimizer(final_states(path)[1]) for path in (tmp_path / "run2", new.path))
        assert_equal(before, after, "what belongs to weights")
    run(longer, new.path, resume=True, progress=False)
    run(
        longer, tmp_path / "run4", resume=True, progress=False
    )  # had four stages from the start; without flushes they would differ
    fresh, moved = (final_states(path)[1] for path in (tmp_path / "run4", new.path))
    for k, (one, other) in enumerate(zip(fresh, moved, strict=True)):
        assert_equal(one["module"], other["module"], f"stage {k}")
    assert timeless(tmp_path / "run4")[16:] == timeless(new.path)[16:]
    with pytest.raises(ConfigError, match="exists; continue that run"):
        recut(RunDir(tmp_path / "run2"), longer)


@pytest.mark.parametrize(("stages", "then"), [(3, 1), (3, 2), (1, 3)])
def test_tied_weights_go_on_with_another_number_of_stages(stages: int, then: int, tmp_path: Path) -> None:
    config = replace(tiny.steady(), model=Component("tiny:tied"), data=Component("tiny:Task"), method="gpipe", steps=16)
    before, after = replace(config, stages=stages), replace(config, stages=then, steps=24)
    run(before, tmp_path / "before", progress=False)
    new = recut(RunDir(tmp_path / "before"), after)
    old, moved = (final_states(path)[1] for path in (tmp_path / "before", new.path))
    weights = [[value for state in states for value in state["module"].values()] for states in (old, moved)]
    assert_equal(weights[0], weights[1], "weights")
    moments = [states[0]["optimizer"]["state"][0] for states in (old, moved)]
    assert_equal(moments[0], moments[1], "the tied weight's optimizer state")
    run(after, new.path, resume=True, progress=False)
    run(replace(after, steps=24), tmp_path / "straight", progress=False)
    for one, other in zip(*(final_states(path)[1] for path in (tmp_path / "straight", new.path)), strict=True):
        for name, value in one["module"].items():
            torch.testing.assert_close(other["module"][name], value, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_cut_anew_is_said_and_nothing_is_written(tmp_path: Path) -> None:
    config = plain(stages=2, steps=2, optimizer=Component("adamw,sgd", {"lr": 0.01}))
    run(config, tmp_path / "mixed", progress=False)
    for stages in (3, 9):
        with pytest.raises(ConfigError, match=f"names 2 for {stages} stages; name one, or one per stage"):
            recut(RunDir(tmp_path / "mixed"), replace(config, stages=stages))
    assert [path.name for path in tmp_path.iterdir()] == ["mixed"]


def test_the_command_line_recuts_and_resumes(tmp_path: Path) -> None:
    with processes.train(tmp_path, "--recipe", "tiny:steady", "--steps", "8", "--quiet", "--name", "one") as first:
        assert first.wait() == 0, first.err
    again = ("--resume", "--name", "one", "--stages", "3", "--steps", "12")
    with processes.train(tmp_path, *again) as second:
        assert second.wait() == 0, second.err
        assert "had 2 stages; it goes on from step 8 with 3 stages in runs/one-3-stages" in second.err
        assert "finished at step 12 of 12" in second.out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stages": 4, "chunks": 3}, "does not divide the 4 stages"),
        ({"stages": 2, "chunks": 2}, "all 2 stages on one process"),
        ({"replicas": 2}, "engine is 'emulator'"),
        ({"replicas": 3, "engine": "processes"}, "3 replicas; set batch_size to 6 or 9, or use uneven"),
        ({"replicas": 3, "engine": "processes", "uneven": True}, "equal parts for 3 replicas"),
        ({"overlap": True, "method": "1f1b"}, "it flushes"),
        ({"recompute": "later"}, "must be 'backward' or 'forward'"),
        ({"stages": 4, "chunks": 2, "clip": 1.0}, "use scope 'stage'"),
        ({"stages": 4, "chunks": 2, "method": "spectrain"}, "for its own order"),
        ({"replicas": 0}, "at least 1"),
    ],
    ids=str,
)
def test_impossible_layouts_are_refused_before_any_work(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check(replace(tiny.recipe(), **changes))
