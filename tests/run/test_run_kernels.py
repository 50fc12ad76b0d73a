"""Where no kernel can be built, everything goes on by the plain path, and one sentence says what was wrong and what to do."""

from __future__ import annotations

import os
import re
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import processes
import tiny
from compare import final_states, timeless
from exactly import assert_equal
from pipeoptim import predict_weights
from pipeoptim.kernels import available, calls, compiler, library, why_not
from pipeoptim.rules import Predictor
from pipeoptim.train import run


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """As in a process that has not asked for kernels yet, with an empty cache and no compiler but the one that CC names."""
    for name in ("CC", "LOCAL_RANK", "PIPEOPTIM_KERNELS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setenv("PIPEOPTIM_CACHE", str(tmp_path / "cache"))
    library.loaded_library.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    library.loaded_library.cache_clear()


def fake_compiler(folder: Path, *lines: str) -> str:
    path = folder / "compiler"
    path.write_text("\n".join(lines))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def said() -> list[str]:
    """What is said when kernels are wanted twice."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert not available() and not available() and why_not()
    return [str(one.message) for one in caught]


def test_training_without_a_compiler_ends_with_the_weights_of_the_plain_path(tmp_path: Path, fresh: pytest.MonkeyPatch) -> None:
    options = ("--recipe", "tiny:recipe", "--engine", "processes", "--name", "without")
    with processes.train(tmp_path, *options, CC="no-such-compiler") as command:
        assert command.wait() == 0, command.err
        told = re.findall(r"[^:\n]*C kernels.*", command.err)
        assert len(told) == 1, command.err
        assert "no C compiler is found (cc, gcc or clang, nor the 'no-such-compiler' that CC names); install gcc" in told[0]
    logs = [path.read_text() for path in (tmp_path / "runs/without/logs").glob("*/*.err")]
    assert len(logs) == 2 and not any("kernels" in log for log in logs)  # workers were told that there are none
    fresh.setenv("PIPEOPTIM_KERNELS", "0")
    run(tiny.recipe(), tmp_path / "off", progress=False)
    assert why_not() == "switched off by PIPEOPTIM_KERNELS"
    without = final_states(tmp_path / "runs/without")
    assert_equal(without, final_states(tmp_path / "off"), "state")
    fresh.undo()
    library.loaded_library.cache_clear()
    if available():  # the kernel's step rounds like torch's, but in another order
        run(tiny.recipe(), tmp_path / "on", progress=False)
        for one, other in zip(timeless(tmp_path / "off"), timeless(tmp_path / "on"), strict=True):
            if "loss" in one:
                assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)


def test_steps_and_predictions_go_on_and_it_is_said_once(fresh: pytest.MonkeyPatch) -> None:
    def stepped(predictor_of: type[Predictor]) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(50, 50))
        optimizer = torch.optim.AdamW([weight])
        predictor, out = predictor_of(optimizer), [torch.empty(50, 50)]
        for _ in range(3):
            weight.grad = torch.randn(50, 50)
            if not (predictor.fuses and predictor.fused_step(out, 2)):
                optimizer.step()
                predictor.after_step()
                predictor.predict_into(out, 2)
        assert torch.equal(out[0], predict_weights(optimizer, 2)[0])
        return weight.detach(), out[0]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        without = stepped(Predictor), stepped(Predictor)
    assert [str(one.message).count("C kernels") for one in caught] == [1]
    assert_equal(without[0], without[1], "the same twice")
    fresh.undo()
    library.loaded_library.cache_clear()
    torch.testing.assert_close(stepped(Predictor), without[0])


def test_the_sentence_fits_what_was_wrong(tmp_path: Path, fresh: pytest.MonkeyPatch) -> None:
    def sentence() -> str:
        library.loaded_library.cache_clear()
        told = said()
        assert len(told) == 1 and "\n" not in told[0] and ". " not in told[0], told
        assert told[0].endswith(", or set PIPEOPTIM_KERNELS=0 to not be told")
        return told[0]

    assert "because no C compiler is found (cc, gcc or clang); install gcc or clang, or let CC name a C compiler" in sentence()
    fresh.setenv(
        "CC", fake_compiler(tmp_path, "#!/bin/sh", "echo optim.c: In function >&2", "echo 'x.h: fatal error: no x' >&2; exit 1")
    )
    assert "compiler failed: x.h: fatal error: no x; install gcc or clang, or let CC name another C compiler" in sentence()
    fresh.setenv("CC", fake_compiler(tmp_path, "#!/no/such/interpreter"))
    assert "No such file or directory" in sentence()
    fresh.setattr(compiler, "TIMEOUT", 0.05)
    fresh.setenv("CC", fake_compiler(tmp_path, "#!/bin/sh", "while :; do :; done"))
    assert "no answer within 0.05 s" in sentence()
    fresh.setattr(compiler, "TIMEOUT", 20.0)
    fresh.setenv("CC", fake_compiler(tmp_path, "#!/bin/sh", 'for last; do if [ "$last" = -o ]; then next=1; elif [ "$next" ]; then',
                                'echo broken >"$last"; next=; fi; done'))  # fmt: skip
    assert "the library cannot be loaded" in (told := sentence()) and f"; delete {tmp_path}/cache/optim-" in told
    assert not os.listdir(tmp_path / "cache") or all("part" not in name for name in os.listdir(tmp_path / "cache"))
    fresh.setenv("LOCAL_RANK", "1")
    library.loaded_library.cache_clear()
    assert said() == []  # another process of this machine says it
    with pytest.raises(AssertionError):
        calls.copy_tensors([torch.ones(3)], [torch.empty(3)])  # nothing runs a library that is not there
