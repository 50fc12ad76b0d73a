"""Where no kernel can be built, everything goes on by the plain path, and one sentence says what was wrong and what to do."""

from __future__ import annotations

import os
import stat
import warnings
from pathlib import Path

import pytest
import torch

from exactly import assert_equal
from pipeoptim import predict_weights
from pipeoptim.kernels import available, calls, compiler, library, why_not
from pipeoptim.rules import Predictor


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
