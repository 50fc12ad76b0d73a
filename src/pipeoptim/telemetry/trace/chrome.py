"""The trace in Chrome's trace-event format, which Perfetto (https://ui.perfetto.dev) and chrome://tracing open.

Two groups of rows: the run, one row per stage with arrows from send to receive, and the ideal schedule of the same actions.
Format: "Trace Event Format", Google, 2016: complete events (X), flow events (s, f) and metadata (M), times in microseconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pipeoptim.errors import counted
from pipeoptim.schedule import Span as IdealSpan
from pipeoptim.telemetry.trace.read import StageTrace, TraceSpan, flatten
from pipeoptim.telemetry.trace.shares import COMMUNICATION, COMPUTE, PACKING, StageShares

# Perfetto takes thread 0 for the idle thread, and a thread with the number of its process for the main one.
RUN, IDEAL = 1000, 2000

Event = dict[str, Any]


def to_chrome(
    stages: Sequence[StageTrace], ideal: Sequence[IdealSpan], shares: Sequence[StageShares], title: str = "run"
) -> dict[str, Any]:
    """The whole file as plain data: ``json.dump`` it; ``title`` says what the stages are of."""
    depth, m = len(stages), stages[0].microbatches
    about = f"{stages[0].method}, {counted(depth, 'stage')}, {counted(m, 'micro-batch')}"
    events: list[Event] = [
        *_names(RUN, f"{title}: {about}", depth),
        *_names(IDEAL, "ideal schedule of the same actions", depth),
    ]
    for stage in stages:
        pieces = flatten(stage.spans)
        events += [_complete(RUN, stage.stage, _label(p), _category(p), p.begin, p.end, _details(p, m)) for p in pieces]
        events += _arrows(stage.stage, depth, pieces)
    for s in ideal:
        args = {"mini-batch": s.action.number if s.action.kind == "U" else s.action.number // m}
        events.append(_complete(IDEAL, s.k, str(s.action), "compute", s.start, s.end, args))
    told = [{name: round(value, 4) for name, value in vars(one).items()} | {"idle": round(one.idle, 4)} for one in shares]
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"about": about, "shares": told}}


def _row(group: int, k: int) -> int:
    return group + 1 + k


def _names(group: int, name: str, depth: int) -> Iterator[Event]:
    yield {"ph": "M", "pid": group, "tid": group, "name": "process_name", "args": {"name": name}}
    yield {"ph": "M", "pid": group, "tid": group, "name": "process_sort_index", "args": {"sort_index": group}}
    for k in range(depth):
        yield {"ph": "M", "pid": group, "tid": _row(group, k), "name": "thread_name", "args": {"name": f"stage {k}"}}
        yield {"ph": "M", "pid": group, "tid": _row(group, k), "name": "thread_sort_index", "args": {"sort_index": k}}


def _complete(group: int, k: int, name: str, category: str, begin: float, end: float, args: dict[str, Any]) -> Event:
    ts, until = round(begin / 1e3, 3), round(end / 1e3, 3)
    return {
        "ph": "X",
        "pid": group,
        "tid": _row(group, k),
        "name": name,
        "cat": category,
        "ts": ts,
        "dur": round(until - ts, 3),
        "args": args,
    }


def _label(span: TraceSpan) -> str:
    if span.what in ("F", "B", "U"):
        return f"{span.what}{span.number}"
    if span.what == "wait":
        return f"wait for stage {span.peer}" if span.peer >= 0 else "wait for all stages"
    if span.what in COMMUNICATION:
        return f"{span.what} {'to' if span.what == 'send' else 'from'} stage {span.peer}"
    return span.what


def _category(span: TraceSpan) -> str:
    return "compute" if span.what in COMPUTE else "communication" if span.what in COMMUNICATION + PACKING else span.what


def _details(span: TraceSpan, m: int) -> dict[str, Any]:
    if span.what in COMMUNICATION:
        return {"message": span.number, "bytes": span.nbytes}
    if span.what == "U":
        return {"mini-batch": span.number}
    return {"micro-batch": span.number, "mini-batch": span.number // m} if span.what in ("F", "B", "predict") else {}


def _arrows(k: int, depth: int, pieces: Sequence[TraceSpan]) -> Iterator[Event]:
    """From the beginning of a message's send to the last piece of its receive."""
    ends = {(p.what, p.peer, p.number): p for p in pieces if p.what == "receive"}
    ends |= {(p.what, p.peer, p.number): p for p in reversed(pieces) if p.what == "send"}
    for (what, peer, number), p in ends.items():
        up = peer > k if what == "send" else k > peer
        # Equal on both ends of a message, and different for the two directions.
        identity = (number * depth + (k if what == "send" else peer)) * 2 + up
        event = {"pid": RUN, "tid": _row(RUN, k), "name": "message", "cat": "communication", "id": identity}
        if what == "send":
            yield {**event, "ph": "s", "ts": round(p.begin / 1e3, 3)}
        else:
            yield {**event, "ph": "f", "bp": "e", "ts": round((p.begin + p.end) / 2e3, 3)}
