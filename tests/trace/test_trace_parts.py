"""The parts of a trace, each against something simpler: painting, known clocks, the schedule's own timeline, sums by hand."""

import re
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pipeoptim as po
from pipeoptim.engine import trace as recording
from pipeoptim.schedule import ActionKind, replay, timeline
from pipeoptim.telemetry.trace.align import align
from pipeoptim.telemetry.trace.picture import picture
from pipeoptim.telemetry.trace.read import StageTrace, TraceSpan, flatten, read
from pipeoptim.telemetry.trace.shares import ideal, shares


def stage(k, spans, depth=2, clock="c", process=None):
    return StageTrace(k, depth, 1, "async_1f1b", "pipeoptim", clock, k if process is None else process, k, tuple(spans))


@st.composite
def nested(draw, begin=0, end=60, level=0):
    """Spans that follow one another or lie inside one another, as a program's blocks do."""
    cuts = sorted(draw(st.lists(st.integers(begin, end), max_size=6)))
    found = []
    for a, b in zip(cuts[::2], cuts[1::2], strict=False):
        if b > a:
            found.append(TraceSpan(f"level {level}", a, a, b))
            if level < 2:
                found += draw(nested(a, b, level + 1))
    return found


@given(nested())
def test_flattened_spans_are_what_painting_outer_before_inner_gives(spans):
    painted = [None] * 60
    for span in sorted(spans, key=lambda s: s.what):
        painted[span.begin : span.end] = [span.what] * (span.end - span.begin)
    told = [None] * 60
    for piece in flatten(spans):
        assert all(value is None for value in told[piece.begin : piece.end])
        told[piece.begin : piece.end] = [piece.what] * (piece.end - piece.begin)
    assert told == painted


@given(st.integers(-(10**12), 10**12), st.lists(st.integers(1, 50), min_size=1), st.lists(st.integers(1, 50), min_size=1))
def test_clocks_of_two_machines_are_aligned_from_messages(shift, up, down):
    """The error is at most half of what the fastest messages of the two ways differ by."""
    here, there = [], []
    for sender, receiver, delays in ((here, there, up), (there, here, down)):
        for n, delay in enumerate(delays):
            begin, end = 1000 * n, 1000 * n + delay
            sender.append(TraceSpan("send", n, begin, begin + 1, 1 if sender is here else 0))
            receiver.append(TraceSpan("receive", n, end - 1, end, 0 if sender is here else 1))
    other = stage(1, there, clock="other").shifted(shift)
    one, two = align([stage(0, here), other])
    zero = min(s.begin for s in here + there)
    assert abs((two.spans[0].begin - one.spans[0].begin) - (there[0].begin - here[0].begin)) <= abs(min(up) - min(down)) / 2 + 1
    same = align([stage(0, here), stage(1, there)])
    assert [s.begin for s in same[1].spans] == [s.begin - zero for s in there], "one clock: nothing is moved"


@pytest.mark.parametrize("method", sorted(po.METHODS))
def test_the_ideal_schedule_of_all_actions_is_the_programs_own(method):
    program = po.get_method(method).program(3, 3)
    durations = {ActionKind.F: 2.0, ActionKind.B: 3.0, ActionKind.U: 0.0}
    plans = [[(k, action) for action in program.full(k, 5)] for k in range(3)]
    assert replay(plans, 3, lambda k, kind: durations[kind]) == timeline(program, 5, 2.0, 3.0)


def test_shares_of_a_trace_made_by_hand():
    first = [TraceSpan("F", 0, 0, 20), TraceSpan("send", 0, 20, 30, 1), TraceSpan("receive", 0, 30, 90, 1)]
    first += [TraceSpan("wait", -1, 35, 85, 1), TraceSpan("B", 0, 90, 100)]
    second = [TraceSpan("F", 0, 40, 60), TraceSpan("B", 0, 60, 70), TraceSpan("data", -1, 70, 80)]
    one, two = shares([stage(0, first), stage(1, second)])
    assert (one.compute, one.communication, one.waiting, one.turns) == pytest.approx((0.3, 0.2, 0.5, 0.0))
    assert (two.compute, two.other, two.idle) == pytest.approx((0.75, 0.25, 0.25))
    # ideal: F 0..20, F 20..40, B 40..50, B 50..60
    assert (one.ideal_idle, two.ideal_idle) == pytest.approx((0.5, 0.4))
    one, two = shares([stage(0, first, process=1), stage(1, second, process=1)])
    assert one.turns == pytest.approx(0.3), "in one process, what the other stage computes is its turn"


def test_moments_of_a_device_come_from_its_own_events(monkeypatch):
    """A device whose clock runs from 5 ms, where the host's says 100 ns."""
    queue = iter([5.0, 7.5])

    class Event:
        def __init__(self, device, enable_timing):
            assert enable_timing

        def record(self, stream):
            self.when = next(queue)

        def synchronize(self):
            pass

        def elapsed_time(self, later):
            return later.when - self.when

    accelerator = SimpleNamespace(synchronize=lambda device: None, current_stream=lambda device: None)
    monkeypatch.setattr(recording.torch, "Event", Event)
    monkeypatch.setattr(recording.torch, "accelerator", accelerator)
    monkeypatch.setattr(recording.time, "perf_counter_ns", lambda: 100)
    clock = recording.DeviceTraceClock(torch.device("meta"))
    assert clock.nanoseconds(clock.now()) == 100 + 2_500_000


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: po.Trace(steps=0), ["steps", "0", "at least 1"]),
        (lambda folder: po.Trace(skip=-1), ["skip", "-1", "at least 0"]),
        (lambda folder: po.merge_trace(folder), ["no trace", "stage-0.json", "--trace"]),
        (lambda folder: _missing(folder), ["one file for each of 2 stages", "stage-0.json"]),
        (lambda folder: _damaged(folder), ["stage-0.json is damaged"]),
        (lambda folder: _twice(), ["already records a stage 0"]),
    ],
)
def test_mistakes_are_told_in_a_sentence(make, words, tmp_path):
    with pytest.raises(po.ConfigError) as error:
        make(tmp_path)
    assert all(word in str(error.value) for word in words), error.value


def pipeline(trace, method="pipeoptim", m=1):
    torch.manual_seed(0)
    stages = [torch.nn.Linear(4, 4) for _ in range(2)]
    return po.Emulator(stages, lambda p: torch.optim.Adam(p), torch.nn.functional.mse_loss, method, m, trace=trace)


def _missing(folder):
    trace = po.Trace()
    pipeline(trace)
    trace.save(folder)[1].unlink()
    read(folder)


def _damaged(folder):
    (folder / "stage-0.json").write_text('{"format": 1, "spans": [[')
    read(folder)


def _twice():
    trace = po.Trace()
    pipeline(trace)
    pipeline(trace)


@pytest.mark.parametrize("method", sorted(po.METHODS))
def test_a_trace_holds_the_program_and_changes_nothing(method, tmp_path):
    x, trace = torch.randn(6, 4), po.Trace()
    traced, plain = pipeline(trace, method, 2), pipeline(None, method, 2)
    for n in range(6):
        assert torch.equal(traced.step(x, target=x), plain.step(x, target=x))
        if n == 2:
            traced.drain()
            plain.drain()
    traced.drain()
    plain.drain()
    trace.save(tmp_path)
    synchronous = traced.method.synchronous_updates
    assert synchronous == 0, "the order below would have more drains"
    for k, found in enumerate(read(tmp_path)):
        first = traced.program.full(k, 3)
        expected = [str(a) for a in first]
        expected += [f"{a.kind.value}{a.number + (3 if a.kind is ActionKind.U else 6)}" for a in first]
        actions = [f"{s.what}{s.number}" for s in sorted(found.spans, key=lambda s: s.begin) if s.what in ("F", "B", "U")]
        assert actions == expected
        predicts = [s for s in found.spans if s.what == "predict"]
        assert bool(predicts) <= traced.method.predicts_on(traced.program, k)
    for ours, theirs in ((traced.stage_module(k), plain.stage_module(k)) for k in range(2)):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_only_the_wanted_mini_batches_are_recorded(tmp_path):
    x, trace = torch.randn(6, 4), po.Trace(steps=3, skip=2)
    pipe = pipeline(trace)
    for _ in range(9):
        with trace.span("data"):
            pass
        pipe.step(x, target=x)
    pipe.drain()
    trace.save(tmp_path)
    one, two = read(tmp_path)
    for found in (one, two):
        assert [s.number for s in found.spans if s.what == "F"] == [2, 3, 4]
    assert len([s for s in one.spans if s.what == "data"]) == 3


def test_several_stages_on_a_device_share_its_ideal_time(tmp_path):
    """Interleaved, four stages on two devices: no two of a device at once, and both as idle as their device."""
    trace, x = po.Trace(), torch.randn(6, 4)
    stages = [torch.nn.Linear(4, 4) for _ in range(4)]
    pipe = po.Emulator(
        stages, lambda p: torch.optim.Adam(p), torch.nn.functional.mse_loss, microbatches=2, processes=2, trace=trace
    )
    for _ in range(5):
        pipe.step(x, target=x)
    pipe.drain()
    trace.save(tmp_path)
    found = read(tmp_path)
    assert [s.device for s in found] == [0, 1, 0, 1]
    spans = ideal(found)
    for device in range(2):
        own = sorted((s.start, s.end) for s in spans if s.k % 2 == device)
        assert all(one[1] <= other[0] for one, other in pairwise(own))
    idle = [one.ideal_idle for one in shares(found)]
    assert idle[0] == idle[2] and idle[1] == idle[3] and all(0 <= share < 1 for share in idle)


def test_the_picture_shows_the_same_actions_measured_and_ideal(tmp_path):
    """Of stages that take turns in one process, fewer of them, in both panels."""
    trace, x = po.Trace(), torch.randn(2, 4)
    stages = [torch.nn.Linear(4, 4) for _ in range(3)]
    pipe = po.Emulator(stages, lambda p: torch.optim.SGD(p, lr=0.1), torch.nn.functional.mse_loss, trace=trace)
    for _ in range(30):
        pipe.step(x, target=x)
    pipe.drain()
    trace.save(tmp_path)
    found = read(tmp_path)
    drawn = picture(found, ideal(found))
    measured, best = drawn.split("ideal schedule of the same actions, ")
    forwards = [re.findall(r"<title>stage 0: (F \d+),", panel) for panel in (measured, best)]
    assert len(forwards[0]) == 24 // 3 and forwards[0] == forwards[1]
