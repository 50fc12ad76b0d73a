"""The matrix of a mini-batch against characteristic polynomials written down by hand, and bounds against closed forms."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.polynomial import Polynomial

from pipeoptim.errors import ConfigError
from pipeoptim.methods import METHODS, get_method
from pipeoptim.schedule import Program
from pipeoptim.stability import (
    LINEAR_OPTIMIZERS,
    PREDICTIONS,
    LinearStage,
    largest_stable_rate,
    linear_optimizer,
    spectral_radius,
)
from pipeoptim.stability.pipelines import linear_stages

Z = Polynomial([0, 1])


def polynomial(optimizer, kind, s):
    """A and B of ``A(z) + lr h B(z) = 0`` for M = 1, from the z-transforms in docs/theory.md."""
    a, f = optimizer.decay, optimizer.feed
    step = optimizer.direct * (Z - a) + optimizer.through * f * Z
    free = (Z - 1) * (Z - a)
    if kind == "none" or s == 0:
        return free * Z**s, step
    if kind in ("refined", "displacement") or (kind == "paper" and optimizer.name != "nesterov"):
        return free * Z ** (s + 1), step * (Z + s * (Z - 1))
    left = s if kind == "paper" else optimizer.through * sum(a**i for i in range(1, s + 1))
    return free * Z**s, step + left * f * (Z - 1)


def optimizer_of(name, decay):
    return linear_optimizer(name, 0.0 if name == "sgd" else decay)


KINDS_OF_ONE_PROGRAM = sorted(
    set(PREDICTIONS) - {"in_progress"}
)  # that one looks into the mini-batch: the emulator is its oracle
DRAWN = {
    "name": st.sampled_from(sorted(LINEAR_OPTIMIZERS)),
    "kind": st.sampled_from(KINDS_OF_ONE_PROGRAM),
    "s": st.integers(0, 12),
    "decay": st.sampled_from([0.0, 0.3, 0.9, 0.99]),
}


@given(**DRAWN, share=st.floats(0.01, 1.5))
def test_eigenvalues_are_the_roots_of_the_characteristic_polynomial(name, kind, s, decay, share):
    optimizer = optimizer_of(name, decay)
    rate = share * optimizer.synchronous_bound
    a, b = polynomial(optimizer, kind, s)
    expected = abs((a + rate * b).roots()).max()
    found = spectral_radius(LinearStage(Program("async_1f1b", s + 1), 0, optimizer, kind), np.array([rate]))
    assert found[0] == pytest.approx(expected, rel=1e-4)  # a root that is nearly a double one is known to half the digits


@given(**DRAWN)
def test_no_crossing_of_the_unit_circle_is_missed(name, kind, s, decay):
    """On the circle ``lr h = -A / B``: the bound is the smallest value of it that is real and positive."""
    optimizer = optimizer_of(name, decay)
    a, b = polynomial(optimizer, kind, s)
    z = np.exp(1j * np.linspace(1e-3, np.pi, 200_001))
    gain = -a(z) / b(z)
    cross = np.flatnonzero(np.diff(np.sign(gain.imag)) != 0)
    values = np.append(gain.real[cross], gain.real[-1])  # z = -1 is real itself
    expected = values[values > 0].min()
    found = largest_stable_rate(LinearStage(Program("async_1f1b", s + 1), 0, optimizer, kind))
    assert found == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("s", [0, 1, 2, 7, 31])
def test_delayed_sgd_has_its_closed_form(s):
    stage = LinearStage(Program("async_1f1b", s + 1), 0, linear_optimizer("sgd"))
    assert largest_stable_rate(stage) == pytest.approx(2 * np.sin(np.pi / (4 * s + 2)), rel=1e-4)


@pytest.mark.parametrize("name", LINEAR_OPTIMIZERS)
def test_without_a_gap_every_kind_has_the_bound_of_synchronous_training(name):
    optimizer = linear_optimizer(name)
    for kind in PREDICTIONS:
        for stage in (
            LinearStage(Program("async_1f1b", 3), 2, optimizer, kind),
            LinearStage(Program("1f1b", 3, 4), 0, optimizer, kind),
        ):
            assert largest_stable_rate(stage) == pytest.approx(optimizer.synchronous_bound, rel=1e-4)


def test_double_buffering_is_a_gap_of_one_everywhere():
    method, adam = get_method("pipedream_2bw"), linear_optimizer("adam")
    one = largest_stable_rate(LinearStage(Program("async_1f1b", 2), 0, adam))
    for stage in linear_stages(method, method.program(4, 4), adam):
        assert largest_stable_rate(stage) == pytest.approx(one, rel=1e-4)


def test_every_method_is_modelled_or_says_why_not():
    modelled = set()
    for name, method in METHODS.items():
        if method.predictor or method.lr_scale or method.compensation:  # parts of its own
            with pytest.raises(ConfigError, match=re.escape(name)):
                linear_stages(method, method.program(4, 4), linear_optimizer("sgd"))
        else:
            stages = linear_stages(method, method.program(4, 4), linear_optimizer("sgd"))
            assert len(stages) == 4
            assert 0 < largest_stable_rate(stages[0]) < 4
            modelled.add(name)
    assert {"gpipe", "naive", "pipedream", "pipedream_2bw", "pipeoptim", "pipeoptim_stash"} <= modelled


@pytest.mark.parametrize(
    ("name", "decay", "says"),
    [("adma", 0.9, "adam"), ("sgd", 0.9, "nesterov"), ("adam", 1.0, "0.9999"), ("adam", float("nan"), "0.9999")],
)
def test_what_is_no_linear_optimizer_is_refused(name, decay, says):
    with pytest.raises(ConfigError, match=says):
        linear_optimizer(name, decay)


@pytest.mark.parametrize("s", [7, 15, 31])
@pytest.mark.parametrize("beta1", [0.9, 0.95, 0.98, 0.99])
def test_rules_of_thumb_of_the_page(s, beta1):
    adam = linear_optimizer("adam", beta1)
    none, refined = (
        largest_stable_rate(LinearStage(Program("async_1f1b", s + 1), 0, adam, kind)) for kind in ("none", "refined")
    )
    assert none == pytest.approx(1.1 / s, rel=0.2)
    pays = 1 - beta1 < 2 / s
    assert (refined > none) == pays
    assert refined == pytest.approx(1.4 / (s**1.5 * np.sqrt(1 - beta1)), rel=0.2) or not pays
