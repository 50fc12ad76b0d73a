"""Programs are valid, their gaps are those of the design, and the drawings show them."""

import itertools
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeoptim.errors import ConfigError, PipeOptimError
from pipeoptim.schedule import (
    ORDERS,
    Action,
    ActionKind,
    Order,
    Program,
    bubble,
    timeline,
    to_svg,
    to_text,
    validate,
    with_transfers,
)
from pipeoptim.schedule import program as program_module
from pipeoptim.schedule import validate as validate_function

depths, micros = st.integers(1, 8), st.integers(1, 8)


@pytest.mark.parametrize("order", ORDERS)
@given(depth=depths, m=micros, minibatches=st.integers(1, 12))
def test_every_order_is_valid_at_every_depth_and_micro_batch_count(order, depth, m, minibatches):
    validate(Program(order, depth, m), minibatches)


@given(depth=depths, m=micros, k=st.integers(0, 7), i=st.integers(0, 200))
def test_the_counted_gap_of_async_1f1b_is_that_of_the_design(depth, m, k, i):
    k %= depth
    ahead = depth - 1 - k
    p = Program("async_1f1b", depth, m)
    assert p.gap(k, i) == i // m - max(0, i - ahead) // m  # updates before B(i) less those before F(i)
    assert p.steady_gap(k, i % m) == max(0, -(-(ahead - i % m) // m))
    if m == 1:
        assert p.gap(k, i) == min(i, ahead)


@pytest.mark.parametrize("order", [name for name, o in ORDERS.items() if o.flushes])
@given(depth=depths, m=micros, i=st.integers(0, 100))
def test_orders_that_flush_have_no_gap(order, depth, m, i):
    assert all(Program(order, depth, m).gap(k, i) == 0 for k in range(depth))


def test_the_order_of_the_design_word_for_word():
    p = Program("async_1f1b", 3)
    assert " ".join(map(str, p.full(0, 4))) == "F0 F1 F2 B0 U0 F3 B1 U1 B2 U2 B3 U3"
    assert " ".join(map(str, p.full(2, 2))) == "F0 B0 U0 F1 B1 U1"


@given(depth=depths, m=micros, n=st.integers(0, 9))
def test_draining_early_does_not_change_a_gap(depth, m, n):
    p = Program("async_1f1b", depth, m)
    for k in range(depth):
        gaps = program_module.count_gaps(p.full(k, n))
        assert gaps == {i: p.gap(k, i) for i in range(n * m)}


@pytest.mark.parametrize("order", ORDERS)
@given(depth=depths, m=micros)
def test_in_flight_is_the_most_that_ever_happens(order, depth, m):
    p = Program(order, depth, m)
    for k in range(depth):
        flying, most = 0, 0
        for action in p.full(k, 2 * depth + 2):
            flying += {ActionKind.F: 1, ActionKind.B: -1}.get(action.kind, 0)
            most = max(most, flying)
        assert most == p.in_flight(k)


def test_async_1f1b_has_no_bubble_in_steady_state():
    spans = [s for s in timeline(Program("async_1f1b", 4), 40) if s.action.kind is not ActionKind.U]
    steady = [s for s in spans if 40 <= s.start < 100]
    assert sum(s.end - s.start for s in steady) == pytest.approx(4 * 60, rel=0.02)


def test_the_bubble_of_gpipe_is_the_textbook_one():
    for depth, m in itertools.product((2, 4), (1, 4)):
        assert bubble(timeline(Program("gpipe", depth, m), 1)) == pytest.approx((depth - 1) / (m + depth - 1))


def test_a_program_that_cannot_work_is_named():
    class Deadlock(Order):
        name, flushes = "deadlock", False

        def step(self, k, depth, m, n):
            f, b, u = Action(ActionKind.F, n), Action(ActionKind.B, n), Action(ActionKind.U, n)
            return [f, b, u]

        def drain(self, k, depth, m, n):
            return []

        def in_flight(self, k, depth, m):
            return 1

    class BackwardFirst(Deadlock):
        def step(self, k, depth, m, n):
            return [Action(ActionKind.B, n), Action(ActionKind.F, n), Action(ActionKind.U, n)]

    class Swapped(Deadlock):
        def step(self, k, depth, m, n):
            pair = [Action(ActionKind.F, 2 * n), Action(ActionKind.F, 2 * n + 1)]
            work = [Action(ActionKind.B, 2 * n), Action(ActionKind.B, 2 * n + 1), Action(ActionKind.U, n)]
            return (pair if k == 0 else pair[::-1]) + work

    def program(order, m=1):
        p = Program("gpipe", 2, m)
        object.__setattr__(p, "order", "test")
        return p, order()

    for order, m, words in ((BackwardFirst, 1, "B0 comes before F0"), (Swapped, 2, "does not match")):
        p, rules = program(order, m)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(program_module, "ORDERS", {"test": rules})
            with pytest.raises(PipeOptimError, match=words):
                validate_function(p, 2)


def test_a_deadlock_is_found():
    class Waits(Order):
        name, flushes = "waits", True

        def step(self, k, depth, m, n):
            f0, f1, b0, b1 = (Action(kind, i) for kind in (ActionKind.F, ActionKind.B) for i in (2 * n, 2 * n + 1))
            # stage 0 wants B(0) before it forwards 1, stage 1 forwards both before any backward
            return [f0, b0, f1, b1, Action(ActionKind.U, n)] if k == 0 else [f0, f1, b0, b1, Action(ActionKind.U, n)]

        def drain(self, k, depth, m, n):
            return []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program_module, "ORDERS", {"waits": Waits()})
        with pytest.raises(PipeOptimError, match=r"deadlocks: stage 0 at B0, stage 1 at F1"):
            validate_function(Program("waits", 2, 2), 1)


def test_bad_programs_are_refused_with_the_value():
    with pytest.raises(ConfigError, match="depth is 0"):
        Program("gpipe", 0)
    with pytest.raises(ConfigError, match="depth 3 with 1000000000 micro-batches .* set microbatches to 25000 or fewer"):
        Program("async_1f1b", 3, 10**9)
    with pytest.raises(ConfigError, match="microbatches is 1.5"):
        Program("gpipe", 2, 1.5)
    with pytest.raises(ConfigError, match="known: async_1f1b"):
        Program("zigzag", 2)
    with pytest.raises(ConfigError, match=r"use 0 \.\. 1"):
        Program("gpipe", 2).gap(2, 0)


def test_transfers_surround_the_work():
    assert [
        str(a) for a in with_transfers([Action(ActionKind.F, 1), Action(ActionKind.B, 0), Action(ActionKind.U, 0)], 1, 3)
    ] == [
        "recv_activation1",
        "F1",
        "send_activation1",
        "recv_gradient0",
        "B0",
        "send_gradient0",
        "U0",
    ]


@pytest.mark.parametrize("order", ORDERS)
def test_the_drawings_hold_every_action(order):
    p = Program(order, 3, 2)
    text, svg = to_text(p, 2), to_svg(p, 2)
    for i in range(4):
        assert text.count(f"F{i}") == text.count(f"B{i}") == 3
    tree = ElementTree.fromstring(svg)
    titles = [t.text for t in tree.iter("{http://www.w3.org/2000/svg}title")]
    assert sorted(titles) == sorted(f"stage {k}: {kind}{i}" for k in range(3) for kind in "FB" for i in range(4))


def test_the_schedule_package_needs_no_torch():
    code = (
        "import sys, types; sys.modules['torch'] = None\n"
        "package = types.ModuleType('pipeoptim'); package.__path__ = [sys.argv[1]]; sys.modules['pipeoptim'] = package\n"
        "import pipeoptim.schedule as s; print(s.to_text(s.Program('gpipe', 2), 1))"
    )
    import pipeoptim

    done = subprocess.run(
        [sys.executable, "-c", code, pipeoptim.__path__[0]], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "stage 1" in done.stdout


@pytest.mark.parametrize("name", sorted(ORDERS))
def test_an_order_says_itself_whether_stages_share_processes(name):
    order = ORDERS[name]
    if order.interleaved_as is not None:
        assert ORDERS[order.interleaved_as].interleaves
    if order.interleaves:
        assert Program(name, 4, 2, processes=2).interleaved
    else:
        assert order.on_processes(2) is order
        with pytest.raises(ConfigError, match="one stage per process"):
            Program(name, 4, 2, processes=2)
