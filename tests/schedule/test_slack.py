"""Slack: programs are valid, hold what is promised in flight, have the gap of the formula, and hide late messages."""

from fractions import Fraction
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pipeoptim as po
from pipeoptim.schedule import (
    ActionKind,
    Program,
    common_delay,
    count_gaps,
    forwards_ahead,
    read_slack,
    timeline,
    to_svg,
    validate,
)

depths, micros = st.integers(1, 8), st.integers(1, 8)
amounts = st.integers(0, 12).map(lambda quarters: quarters / 4)


@st.composite
def slacks(draw, depth):
    each = st.lists(amounts, min_size=depth - 1, max_size=depth - 1)
    return draw(st.one_of(amounts, each) if depth > 1 else amounts)  # one stage has no boundary


def ahead_by_hand(slack, depth, k):
    each = slack if isinstance(slack, list) else [slack] * (depth - 1)
    return ceil(sum((1 + Fraction(x) for x in each[k:]), Fraction(0)))


@given(data=st.data(), depth=depths, m=micros, minibatches=st.integers(1, 12))
def test_a_program_with_slack_is_valid_and_keeps_its_promises(data, depth, m, minibatches):
    """Every F before its B, first-in first-out between stages, no deadlock; in flight and gap by the formulas; gaps repeat."""
    slack = data.draw(slacks(depth))
    p = Program("async_1f1b", depth, m, slack=slack)
    validate(p, minibatches)
    for k in range(depth):
        ahead = ahead_by_hand(slack, depth, k)
        assert p.in_flight(k) == ahead + 1
        flying = most = 0
        actions = p.full(k, ceil((ahead + 1) / m) + 2)
        for action in actions:
            flying += {ActionKind.F: 1, ActionKind.B: -1}.get(action.kind, 0)
            most = max(most, flying)
        assert most == ahead + 1
        gaps = count_gaps(actions)
        assert gaps == {i: p.gap(k, i) for i in gaps}
        for i in (*range(min(3 * m, 20)), 1000 + m):
            assert p.gap(k, i) == i // m - max(0, i - ahead) // m
            assert p.steady_gap(k, i % m) == max(0, ceil((ahead - i % m) / m))
            assert p.version_at_forward(k, i) == max(0, i - ahead) // m


@given(depth=depths, m=micros, n=st.integers(0, 9), overlap=st.booleans())
def test_no_slack_is_the_program_without_it(depth, m, n, overlap):
    plain = Program("async_1f1b", depth, m, overlap=overlap)
    none = Program("async_1f1b", depth, m, overlap=overlap, slack=[0] * (depth - 1) or 0)
    assert plain == none
    zeros = Program("async_1f1b", depth, m, overlap=overlap, slack=1e-9 if depth == 1 else 0)
    assert [zeros.step(k, n) for k in range(depth)] == [plain.step(k, n) for k in range(depth)]


@given(data=st.data(), depth=st.integers(2, 8), m=micros)
def test_updates_of_all_stages_are_ordered_as_far_apart_as_stage_0_is_ahead(data, depth, m):
    p = Program("async_1f1b", depth, m, slack=data.draw(slacks(depth)))
    assert common_delay(p, (0, depth - 1)) == ceil(p.in_flight(0) / m)


@given(p=st.integers(1, 5), v=st.integers(1, 4), m=st.integers(1, 6), slack=amounts, overlap=st.booleans())
def test_interleaved_programs_take_slack(p, v, m, slack, overlap):
    program = Program("async_interleaved", p * v, m, p, overlap, slack)
    validate(program, 3)
    n = 3 * program.warm_up + 2
    for k in range(p * v):
        actions = program.full(k, n)
        assert count_gaps(actions) == {i: program.gap(k, i) for i in range(n * m)}
    if v == 1 and p > 1:
        plain = Program("async_1f1b", p, m, overlap=overlap, slack=slack)
        assert [plain.full(k, 4) for k in range(p)] == [program.full(k, 4) for k in range(p)]


def period(program, delay, minibatches=60):
    """Time per mini-batch in the middle of a run, F one third and B two of a stage's time per micro-batch."""
    spans = timeline(program, minibatches, 1 / 3, 2 / 3, delay)
    ends = {s.action.number: s.end for s in spans if s.k == 0 and s.action.kind is ActionKind.U}
    return (ends[50] - ends[20]) / 30 / program.microbatches


@pytest.mark.parametrize("depth", [4, 8])
def test_slack_hides_a_delay(depth):
    """A round trip over one boundary costs two delays, and slack x gives it x times a stage's time."""
    for delay, slack in ((0.3, 1), (1.0, 2), (0.5, 1)):
        assert period(Program("async_1f1b", depth, slack=slack), delay) == pytest.approx(1.0)
    assert period(Program("async_1f1b", depth), 0.3) > 1.4
    slow_link = [0.0] * (depth - 1)
    slow_link[1] = 2.0
    assert period(Program("async_1f1b", depth, slack=slow_link), 0.0) == pytest.approx(1.0)


def test_interleaved_slack_hides_a_delay():
    """Two stages per process, each half of its time: a delay of 0.3 of a process's time is 0.6 of a stage's."""
    plain, slack = (Program("async_interleaved", 8, 4, 4, slack=x) for x in (0, 2))
    before, after = (period(program, 0.6, 70) / 2 for program in (plain, slack))
    assert before > 1.15
    assert after < before - 0.1


def test_what_is_no_slack_is_refused_with_the_value():
    for value in (-1, "a", [1, "b"], None, float("nan"), float("inf"), True, [True], [], "", 10**6, object()):
        with pytest.raises(po.ConfigError, match="slack is .* must be a number from 0 to 1000"):
            read_slack(value)
    with pytest.raises(po.ConfigError, match="slack has 2 numbers, must have one for each of the 3 boundaries"):
        Program("async_1f1b", 4, slack=[1, 1])
    for order in ("gpipe", "1f1b"):
        with pytest.raises(po.ConfigError, match=f"order '{order}' cannot have slack: it flushes"):
            Program(order, 4, 4, slack=1)
    with pytest.raises(po.ConfigError, match="must be a single number where several stages share a process"):
        Program("async_interleaved", 4, 2, 2, slack=[1, 0, 1])
    with pytest.raises(po.ConfigError, match="slack 1000 at depth 500 with 1 micro-batches is more than can be counted"):
        Program("async_1f1b", 500, slack=1000)
    assert forwards_ahead(0.1, 11, 0) == 11  # exact: 1.1 * 10 is 11, not 11.000000000000002


def test_drawings_say_the_slack():
    assert "slack 0,1.5" in to_svg(Program("async_1f1b", 3, slack="0,1.5"), 2)


@pytest.mark.parametrize("name", sorted(po.METHODS))
def test_every_method_takes_slack_or_says_why_not(name):
    method, depth = po.METHODS[name], 4
    try:
        program = method.program(depth, 8, slack=1)
    except po.ConfigError as error:
        assert method.program(depth, 8).flushes or "by a formula for the depth alone" in str(error)  # noqa: PT017
        return
    assert program.in_flight(0) == 7
    if method.at_least_depth_microbatches:
        assert method.program(depth, 7, slack=1).steady_gap(0) == 1
        with pytest.raises(po.ConfigError, match="in flight on stage 0, 7 with slack 1: microbatches is 6"):
            method.program(depth, 6, slack=1)
