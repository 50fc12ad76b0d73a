"""With every part of a training loop switched on, processes compute what the emulator computes, bit for bit."""

import math
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

import loop_cases as cases
import pipeoptim as po
import stage_processes

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loop")
    stage_processes.run(HERE / "loop_worker.py", cases.DEPTH, str(folder), timeout=120)
    return lambda name, k: torch.load(folder / f"{name}-{k}.pt", weights_only=True)


def emulate(name):
    method, m, _, options, _, _ = cases.CASES[name]
    modules, optimizers, schedulers = zip(*(cases.stage(name, k) for k in range(cases.DEPTH)), strict=True)
    averages = cases.Averages(dict(enumerate(modules)))
    pipe = po.Emulator(
        modules, optimizers, cases.loss_fn, method, m, schedulers=schedulers, seed=3, on_update=averages, **options
    )
    return cases.train(name, pipe, averages), pipe, averages


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


@pytest.mark.parametrize("name", sorted(cases.CASES))
def test_processes_equal_the_emulator_bit_for_bit(name, theirs):
    ours, _, averages = emulate(name)
    for k in range(cases.DEPTH):
        assert ours[k]["state"]["version"] == cases.UPDATES
        assert [v for j, v in averages.versions if j == k] == list(range(1, cases.UPDATES + 1))
        other = theirs(name, k)
        for part in ours[k]:
            pairs = list(zip(tree_leaves(ours[k][part]), tree_leaves(other[part]), strict=True))
            assert all(same(a, b) for a, b in pairs), f"{name}: {part} of stage {k} differs"
            assert all(torch.isfinite(a).all() for a, _ in pairs if isinstance(a, torch.Tensor) and a.is_floating_point())
    assert all(norm is not None for _, norm, _ in ours[0]["figures"][-5:]) == ("clip" in cases.CASES[name][3])


def test_the_cases_differ_where_they_should():
    """Equal engines would prove nothing if clipping, skipping and measuring never happened."""
    for name in ("stage", "global", "global_flush", "delayed", "autocast"):
        clip = cases.CASES[name][3]["clip"]
        ours, _, _ = emulate(name)
        for k in range(cases.DEPTH):
            assert max(norm or 0 for _, norm, _ in ours[k]["figures"]) > getattr(clip, "max_norm", clip)
    ours, _, _ = emulate("scaler")
    skips = [cases.UPDATES - ours[k]["state"]["scheduler"]["last_epoch"] for k in range(cases.DEPTH)]
    assert skips == [2, 2, 0, 0], "stages 1 and 0 see an infinite gradient in two mini-batches, the later stages never"
    ours, _, _ = emulate("monitor")
    measured = [len(ours[k]["figures"][-1][2]) for k in range(cases.DEPTH)]
    assert measured == [1, 1, 1, 0], "the last stage predicts nothing"
