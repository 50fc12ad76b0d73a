"""The library of a wheel: its variants for different processors and one compiled for this machine give the same bits."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeoptim import ConfigError
from pipeoptim.kernels import calls, compiler, library, sampling
from pipeoptim.kernels.library import LoadedLibrary
from pipeoptim.rules import ClipEstimate, Predictor
from test_kernels_dry import Run
from test_kernels_fused import FORMS, OPTIONS, copy_of, give_gradients, make, weights_of

pytestmark = pytest.mark.skipif(not library.available(), reason="no C compiler")


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("portable") / "optim.so"
    compiler.compile_portable(compiler.find_compiler(), path)
    return path


def runnable(path: Path) -> list[LoadedLibrary]:
    """The variants that this processor can run; each can also run those before it."""
    names = list(reversed(compiler.VARIANTS.get(os.uname().machine, {"baseline": ()})))
    best = library.load_portable(path).variant
    return [library.load_portable(path, name) for name in names[: names.index(best) + 1]]


def after_steps(name: str, kind: str, used: LoadedLibrary, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Weights, states and predictions after some steps; tensors of all layouts and alignments."""
    monkeypatch.setattr(calls, "library", lambda: used.entries)
    optimizer = make(name, FORMS)
    predictor = Predictor(optimizer, kind=kind)
    out = [copy_of(weight.detach()) for weight in weights_of(optimizer)]
    fused = 0
    for update in range(8):
        give_gradients(optimizer, update)
        if predictor.fused_step(out, 3):
            fused += 1
        else:
            optimizer.step()
            predictor.after_step()
            predictor.predict_into(out, 3)
    assert fused >= 2
    states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    return [*weights_of(optimizer), *states, *out]


NAMES = ("adam", "adam_coupled", "adamw", "momentum_all", "nesterov", "adagrad", "rmsprop", "radam")
CASES = [
    (name, kind)
    for name in NAMES
    for kind in ("refined", "decayed", "displacement")
    if kind != "decayed" or name not in ("adagrad", "rmsprop")  # which keep no momentum
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_all_variants_give_the_same_bits(name: str, kind: str, portable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert name in OPTIONS
    expected = after_steps(name, kind, library.loaded_library(), monkeypatch)
    for used in runnable(portable):
        for one, other in zip(expected, after_steps(name, kind, used, monkeypatch), strict=True):
            assert torch.equal(one, other), used.variant


@pytest.mark.parametrize("name", ["adam_coupled", "momentum_all", "rmsprop", "radam"])
def test_dry_steps_of_all_variants_give_the_same_bits(name: str, portable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for used in [library.loaded_library(), *runnable(portable)]:
        monkeypatch.setattr(calls, "library", lambda used=used: used.entries)
        run = Run(name)
        run.predictor.predict_into(run.out, 2, run.known(0.5), ClipEstimate(0.5))
        found.append([w.clone() for w in run.out])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_samples_and_counts_of_all_variants_are_the_same(portable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    before, predicted, now = torch.randn(3, 1001).unbind()
    found = set()
    for used in [library.loaded_library(), *runnable(portable)]:
        monkeypatch.setattr(sampling, "library", lambda used=used: used.entries)
        ends, sums = torch.tensor([400, 1001]), torch.empty(6, dtype=torch.float64)
        assert used.entries is not None
        addresses = (before.data_ptr(), predicted.data_ptr(), now.data_ptr())
        used.entries.products(*addresses, 2, ends.data_ptr(), sums.data_ptr())
        found.add(tuple(sums.tolist()))
    assert len(found) == 1


def test_the_library_of_a_wheel_needs_no_compiler(portable: Path, fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(library, "PORTABLE", portable)
    found = library.loaded_library()
    assert found.entries is not None and found.origin == "prebuilt" and found.variant != "native" and not found.remedy
    assert not Path(os.environ["PIPEOPTIM_CACHE"]).exists()


def test_a_wheels_library_that_cannot_be_loaded_is_told_of(tmp_path: Path, fresh: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "optim.so"
    broken.write_text("no library")
    fresh.setattr(library, "PORTABLE", broken)
    with pytest.warns(
        UserWarning, match=r"no C compiler is found.*, and the library of the wheel cannot be loaded \(.*optim.so"
    ):
        assert not library.available()


def test_who_asks_for_a_native_library_gets_it(portable: Path, fresh: pytest.MonkeyPatch) -> None:
    fresh.undo()
    fresh.setattr(library, "PORTABLE", portable)
    fresh.setenv("PIPEOPTIM_KERNELS", "native")
    library.loaded_library.cache_clear()
    found = library.loaded_library()
    assert (found.origin, found.variant, found.reason) == ("built", "native", "PIPEOPTIM_KERNELS asks for it")


def test_another_value_of_the_switch_is_refused(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("PIPEOPTIM_KERNELS", "gcc")
    with pytest.raises(ConfigError, match="PIPEOPTIM_KERNELS is 'gcc', must be 'off'"):
        library.available()


def test_a_variant_that_a_library_lacks_is_refused(portable: Path) -> None:
    with pytest.raises(OSError, match="adam_sse9"):
        library.load_portable(portable, "sse9")


def test_the_variant_that_is_chosen_is_the_best_that_the_processor_has(portable: Path) -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    expected = (
        "avx512" if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= set(flags) else "avx2" if "avx2" in flags else "baseline"
    )
    assert library.load_portable(portable).variant == expected
