"""A run on a machine where no kernel can be built."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import processes
import tiny
from compare import final_states, timeless
from exactly import assert_equal
from pipeoptim.kernels import available, library, why_not
from pipeoptim.train import run


def test_training_without_a_compiler_ends_with_the_weights_of_the_plain_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--recipe", "tiny:recipe", "--engine", "processes", "--name", "without")
    with processes.train(
        tmp_path, *options, CC="no-such-compiler", PATH=str(tmp_path / "nothing"), PIPEOPTIM_CACHE=str(tmp_path / "cache")
    ) as command:
        assert command.wait() == 0, command.err
        told = re.findall(r"[^:\n]*C kernels.*", command.err)
        assert len(told) == 1, command.err
        assert "no C compiler is found (cc, gcc or clang, nor the 'no-such-compiler' that CC names); install gcc" in told[0]
    logs = [path.read_text() for path in (tmp_path / "runs/without/logs").glob("*/*.err")]
    assert len(logs) == 2 and not any("kernels" in log for log in logs)  # workers were told that there are none
    monkeypatch.setenv("PIPEOPTIM_KERNELS", "0")
    library.loaded_library.cache_clear()
    run(tiny.recipe(), tmp_path / "off", progress=False)
    assert why_not() == "switched off by PIPEOPTIM_KERNELS"
    without = final_states(tmp_path / "runs/without")
    assert_equal(without, final_states(tmp_path / "off"), "state")
    monkeypatch.undo()
    library.loaded_library.cache_clear()
    if available():  # the kernel's step rounds like torch's, but in another order
        run(tiny.recipe(), tmp_path / "on", progress=False)
        for one, other in zip(timeless(tmp_path / "off"), timeless(tmp_path / "on"), strict=True):
            if "loss" in one:
                assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)
