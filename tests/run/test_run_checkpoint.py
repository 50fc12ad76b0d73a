"""A checkpoint is complete or it is none: torn ones are found out, passed over and replaced."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._pytree import tree_flatten

import tiny
from compare import assert_same_state, timeless
from pipeoptim import ConfigError
from pipeoptim.checkpoint import BackgroundWriter, TornError, background_writer, find, load_stage, save, verify
from pipeoptim.checkpoint.write_checkpoint import CheckpointWriteError
from pipeoptim.cli.app import _run
from pipeoptim.train import run
from pipeoptim.train.group import SingleProcessGroup


def write(root: Path, step: int, keep: int = 2) -> Path:
    states = {k: {"w": torch.full((3,), float(step + k))} for k in range(2)}
    return save(root, step, states, config="c", group=SingleProcessGroup(), keep=keep, versions={"torch": torch.__version__})


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    folder = write(tmp_path, 7)
    assert folder.name == "step-000007"
    meta = verify(folder)
    assert (meta.step, meta.stages, meta.config) == (7, 2, "c")
    assert load_stage(folder, 1)["w"].tolist() == [8.0] * 3


def test_a_stage_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    shared = torch.randn(4, 3)
    state = {
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)}}
        },
        "transposed": torch.randn(4, 3).t(),
        "with gaps": torch.randn(4, 6)[:, ::2],
        "one row": torch.randn(8, 1, 3, 3).to(memory_format=torch.channels_last),
        "twice": [shared, shared],
        "half": torch.randn(3, dtype=torch.bfloat16),
        "random": torch.get_rng_state(),
        "empty": torch.empty(0, 3),
        "plain": {"lr": 0.1, "betas": (0.9, float("inf")), "none": None, "name": "a/b", 1: True},
    }
    save(tmp_path, 1, {0: state}, config="c", group=SingleProcessGroup(), keep=2, versions={})
    loaded = load_stage(tmp_path / "step-000001", 0)
    ours, spec = tree_flatten(state)
    theirs, other = tree_flatten(loaded)
    assert spec == other
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b) and a.dtype == b.dtype
        else:
            assert a == b and type(a) is type(b)
    exp_avg = loaded["optimizer"]["state"][0]["exp_avg"]
    assert exp_avg.is_contiguous(memory_format=torch.channels_last) and not exp_avg.is_contiguous()
    assert loaded["transposed"].stride() == (1, 3)
    assert loaded["twice"][0].data_ptr() != loaded["twice"][1].data_ptr()


def test_a_pickle_in_the_place_of_a_stage_is_refused_unopened(tmp_path: Path) -> None:
    class Planted:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
            return open, (str(tmp_path / "was-here"), "w")

    folder = write(tmp_path, 3)
    torch.save({"w": Planted()}, folder / "stage-1.safetensors")
    with pytest.raises(ConfigError, match="is no file of a checkpoint"):
        load_stage(folder, 1)
    assert not (tmp_path / "was-here").exists()


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 1_000_000, 2_000_000):
        write(tmp_path, step)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["step-1000000", "step-2000000"]
    found = find(tmp_path)
    assert found.meta is not None
    assert found.meta.step == 2_000_000


def test_a_crash_while_writing_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 5)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError("power cut")))
        with pytest.raises(OSError, match="power cut"):
            write(tmp_path, 10)
    found = find(tmp_path)
    assert found.meta is not None
    assert (found.meta.step, found.torn) == (5, ())
    write(tmp_path, 10)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["step-000005", "step-000010"]


@given(st.sampled_from(["meta.json", "stage-0.safetensors", "stage-1.safetensors"]), st.integers(0, 10**6), st.integers(1, 255))
def test_any_changed_byte_is_noticed(tmp_path_factory: pytest.TempPathFactory, name: str, where: int, flip: int) -> None:
    folder = write(tmp_path_factory.mktemp("flip"), 3)
    good = verify(folder)
    content = bytearray((folder / name).read_bytes())
    content[where % len(content)] ^= flip
    (folder / name).write_bytes(content)
    if name == "meta.json":
        try:
            found = verify(folder)
        except TornError:
            return
        assert found == good  # another kind of white space
    else:
        with pytest.raises(TornError, match=f"{name} has another SHA-256"):
            verify(folder)


def cut_short(folder: Path) -> None:
    path = folder / "stage-1.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


TEARS: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut short": (cut_short, "bytes"),
    "file missing": (lambda folder: (folder / "stage-0.safetensors").unlink(), "stage-0.safetensors is missing"),
    "meta missing": (lambda folder: (folder / "meta.json").unlink(), "meta.json cannot be read"),
    "meta half": (lambda folder: (folder / "meta.json").write_text('{"step": 24, "fi'), "meta.json cannot be read"),
    "meta of no stages": (lambda folder: (folder / "meta.json").write_text("[]"), "meta.json cannot be read"),
    "empty": (lambda folder: [path.unlink() for path in folder.iterdir()], "meta.json cannot be read"),
}


@pytest.mark.parametrize("tear", TEARS)
def test_resume_passes_over_a_torn_checkpoint(tear: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where, (damage, reason) = tmp_path / "tiny", TEARS[tear]
    run(tiny.recipe(), where, progress=False)
    shutil.copytree(where, tmp_path / "whole")
    damage(where / "checkpoints" / "step-000024")
    result = run(tiny.recipe(), where, resume=True, progress=False)
    error = capsys.readouterr().err
    assert "step-000024 is torn" in error
    assert reason in error
    assert "resuming from step-000016" in error
    assert result.step == 24
    assert_same_state(where, tmp_path / "whole")
    assert timeless(where) == timeless(tmp_path / "whole")


def test_no_checkpoint_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    run(tiny.recipe(), "runs/tiny", progress=False)
    before = (tmp_path / "runs/tiny/metrics.jsonl").read_text()
    for folder in (tmp_path / "runs/tiny/checkpoints").iterdir():
        cut_short(folder)
    for removed in (False, True):
        if removed:
            shutil.rmtree(tmp_path / "runs/tiny/checkpoints")
        assert _run(["train", "--resume", "--name", "tiny"]) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        assert ("no checkpoint in" if removed else "no complete checkpoint") in error
        assert ("without --resume: it starts at step 0" if removed else "another --name") in error
    assert (tmp_path / "runs/tiny/metrics.jsonl").read_text() == before


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is the state of that moment; a failure is told at the next checkpoint; what a kill has left is cleared away."""
    (tmp_path / ".step-000001.tmp").mkdir()
    writer = BackgroundWriter(tmp_path, SingleProcessGroup(), config="c", keep=2, versions={})
    weight, count = torch.ones(3), [1]
    for step in (3, 4):
        writer.begin(step, {0: {"w": weight, "count": count}})
        weight.add_(1)
        count[0] += 1
    writer.finish()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-000003", "step-000004"]
    assert [load_stage(tmp_path / f"step-00000{n}", 0)["w"][0] for n in (3, 4)] == [1, 2]
    assert [load_stage(tmp_path / f"step-00000{n}", 0)["count"] for n in (3, 4)] == [[1], [2]]
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(background_writer, "write_packed", Mock(side_effect=full))
    writer.begin(5, {0: {"w": weight}})
    with pytest.raises(CheckpointWriteError, match=r"step-000005 cannot be written \(no space left on device\)"):
        writer.begin(6, {0: {"w": weight}})
    assert find(tmp_path).folder == tmp_path / "step-000004"
