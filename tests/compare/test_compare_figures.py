"""The arithmetic of comparisons: examples in the docstrings, and what must hold for all numbers."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pipeoptim.compare
from pipeoptim.compare.statistics import Curve, Spread, default_target, share_of_gap, smooth, steps_to
from pipeoptim.telemetry.metrics import tail_mean

FINITE = st.floats(-100, 100)
MODULES = [info.name for info in pkgutil.walk_packages(pipeoptim.compare.__path__, "pipeoptim.compare.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@given(FINITE, st.floats(0.01, 10), st.floats(-2, 2), FINITE, st.floats(0.1, 10))
def test_share_of_gap_does_not_depend_on_the_unit(low: float, gap: float, share: float, shift: float, scale: float) -> None:
    """The same share in any unit of loss, and the loss that lies at that share of the way."""

    def at(x: float) -> Spread | None:
        return Spread.of([scale * x + shift])

    loss = low + gap * (1 - share)
    found = share_of_gap(scale * loss + shift, at(low), at(low + gap))
    assert found == pytest.approx(share, abs=1e-6)


@given(st.lists(FINITE, min_size=1, max_size=60), st.integers(1, 70))
def test_smooth_stays_within_the_values(values: list[float], width: int) -> None:
    out = smooth(values, width)
    assert len(out) == len(values)
    assert all(min(values) - 1e-9 <= v <= max(values) + 1e-9 for v in out)
    assert out[-1] == pytest.approx(sum(values[-width:]) / len(values[-width:]))


@given(st.lists(FINITE, min_size=1, max_size=50), FINITE)
def test_steps_to_is_the_first(values: list[float], target: float) -> None:
    found = steps_to(Curve(list(range(1, len(values) + 1)), values), target)
    if found is None:
        assert min(values) > target
    else:
        assert values[found - 1] <= target and all(v > target for v in values[: found - 1])


def test_tail_is_five_percent() -> None:
    assert tail_mean([1.0] * 190 + [3.0] * 10) == 3.0
    assert tail_mean([1.0] * 189 + [3.0] * 11) == 3.0
    assert tail_mean([1.0] * 191 + [3.0] * 9) == pytest.approx(2.8)
    assert tail_mean([5.0]) == 5.0
    assert tail_mean([]) is None


def test_gap_within_the_noise_has_no_share() -> None:
    sync, noisy = Spread.of([1.0, 1.1]), Spread.of([1.2, 1.3])
    assert share_of_gap(1.15, sync, noisy) == pytest.approx(0.5)
    assert share_of_gap(1.15, sync, Spread.of([1.0, 1.3])) is None
    assert share_of_gap(None, sync, noisy) is None
    assert share_of_gap(1.0, sync, None) is None
    assert share_of_gap(1.0, Spread.of([2.0]), Spread.of([1.0])) is None, "asynchrony helped: nothing to close"


def test_default_target_is_reached_by_every_synchronous_run() -> None:
    losses = [1.2, 0.9, None]
    target = default_target(losses)
    assert target is not None and all(loss < target for loss in losses if loss is not None)
    assert default_target([None]) is None
