"""``pipeoptim doctor`` says what is active and why, and its exit code whether something is broken."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeoptim.cli import main
from pipeoptim.kernels import calls, library

NAMES = ["python", "pipeoptim", "torch", "threads", "kernels", "C compiler", "cache", "distributed", "GPU", "Triton"]


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    for name in ("CC", "LOCAL_RANK", "PIPEOPTIM_KERNELS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIPEOPTIM_CACHE", str(tmp_path / "cache"))
    library.loaded_library.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    library.loaded_library.cache_clear()


def doctor(capsys: pytest.CaptureFixture[str], code: int = 0) -> dict[str, dict[str, str]]:
    with pytest.raises(SystemExit) as end:
        main(["doctor", "--json"])
    said = capsys.readouterr()
    assert end.value.code == code, said.out
    assert not said.err
    return {one["name"]: one for one in json.loads(said.out)}


def test_what_is_there_is_found(fresh: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if not library.available():
        pytest.skip("no C compiler")
    found = doctor(capsys)
    assert list(found) == NAMES
    assert found["kernels"]["state"] == "ok" and found["kernels"]["found"] == "built, native"
    assert str(torch.__version__) in found["torch"]["found"]
    assert "gloo" in found["distributed"]["found"]
    assert found["cache"] == {
        "name": "cache",
        "state": "ok",
        "found": os.environ["PIPEOPTIM_CACHE"],
        "reason": "for kernels that are compiled on this machine",
    }


def test_the_table_shows_all_of_it(fresh: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fresh.setenv("PIPEOPTIM_KERNELS", "off")
    with pytest.raises(SystemExit) as end:
        main(["doctor"])
    said = capsys.readouterr().out
    assert end.value.code == 0
    assert all(name in said for name in NAMES)
    assert "switched off by" in said


def test_kernels_that_are_wanted_and_cannot_be_had_are_broken(
    fresh: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    fresh.setenv("PATH", str(tmp_path))
    found = doctor(capsys, code=1)
    assert found["kernels"]["state"] == "broken"
    assert found["kernels"]["reason"] == (
        "no C compiler is found (cc, gcc or clang); install gcc or clang, or let CC name a C compiler"
    )
    assert found["C compiler"]["state"] == "absent"
    assert not recwarn.list


def test_a_cache_that_others_can_write_to_is_told_of(
    fresh: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    found = doctor(capsys, code=0 if library.available() else 1)
    assert found["cache"]["state"] == "warning"
    assert "can be written by others" in found["cache"]["reason"]


def test_kernels_that_compute_wrongly_are_broken(fresh: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if not library.available():
        pytest.skip("no C compiler")
    lazy = dataclasses.replace(library.library(), adam=lambda *arguments: 0)
    fresh.setattr(calls, "library", lambda: lazy)
    found = doctor(capsys, code=1)
    assert found["kernels"]["state"] == "broken"
    assert "a step of AdamW differs from torch's" in found["kernels"]["reason"]


def test_a_check_that_fails_is_a_finding(fresh: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fresh.setattr(torch.cuda, "is_available", lambda: 1 // 0)
    found = doctor(capsys, code=1)
    assert found["gpu"]["state"] == "broken" and "ZeroDivisionError" in found["gpu"]["found"]
    assert list(found)[:8] == NAMES[:8]


def test_more_threads_than_cores_are_a_warning(fresh: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fresh.setattr(torch, "get_num_threads", lambda: 4096)
    assert doctor(capsys, code=0 if library.available() else 1)["threads"]["state"] == "warning"
