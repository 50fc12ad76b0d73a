"""The files that the stages of a traced run wrote, checked, and cut into spans that do not overlap."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from pipeoptim.errors import ConfigError


class TraceSpan(NamedTuple):
    """Something that a stage did, in nanoseconds.

    Attributes:
        what: F, B, U, predict, wait, send, receive, evaluate, or a name that the user gave.
        number: the micro-batch of F, B and predict, the mini-batch of U, the position of a message among those of its link.
        peer: the other stage of a message or a wait, else -1.
        nbytes: of a message.
    """

    what: str
    number: int
    begin: int
    end: int
    peer: int = -1
    nbytes: int = 0


@dataclass(frozen=True)
class StageTrace:
    """What one stage did.

    Attributes:
        clock: equal where two stages read the same clock. process: equal where they share a process, and take turns in it.
        device: which of the processes of a real pipeline the stage belongs to, also where all stages were emulated in one.
        spans: in the order of their ends; they may lie inside one another.
    """

    stage: int
    depth: int
    microbatches: int
    order: str
    method: str
    clock: str
    process: int
    device: int
    spans: tuple[TraceSpan, ...]

    def shifted(self, by: int) -> StageTrace:
        """With ``by`` added to all times."""
        moved = tuple(s._replace(begin=s.begin + by, end=s.end + by) for s in self.spans)
        return replace(self, spans=moved)


def read(folder: Path) -> list[StageTrace]:
    """All stages, by number.

    Raises:
        ConfigError: there is no trace in ``folder``, or stages are missing, or the files are of different runs.
    """
    paths = sorted(folder.glob("stage-*.json"))
    if not paths:
        raise ConfigError(f"no trace in {folder} (no stage-0.json); train with --trace, or save a pipeoptim.Trace there")
    stages = sorted((_stage(path) for path in paths), key=lambda s: s.stage)
    depth = stages[0].depth
    if [s.stage for s in stages] != list(range(depth)) or any(s.depth != depth for s in stages):
        found = ", ".join(path.name for path in paths)
        raise ConfigError(f"the trace in {folder} must have one file for each of {depth} stages of one run, has {found}")
    return stages


def _stage(path: Path) -> StageTrace:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.pop("format") != 1:
            raise KeyError("format")
        return StageTrace(**{**data, "spans": tuple(TraceSpan(*row) for row in data["spans"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged or of another version ({error}); record the trace again") from error


def flatten(spans: Sequence[TraceSpan]) -> list[TraceSpan]:
    """Pieces that do not overlap: where spans lie inside one another, the innermost counts.

    Example:
        >>> inside = [TraceSpan("receive", 0, 0, 10), TraceSpan("wait", -1, 2, 9)]
        >>> [(s.what, s.begin, s.end) for s in flatten(inside)]
        [('receive', 0, 2), ('wait', 2, 9), ('receive', 9, 10)]
    """
    pieces: list[TraceSpan] = []
    stack: list[tuple[TraceSpan, int]] = []  # what is going on, and until when it is told

    def close(until: int) -> None:
        while stack and stack[-1][0].end <= until:
            span, told = stack.pop()
            piece(span, told, span.end)
            if stack:
                stack[-1] = (stack[-1][0], max(stack[-1][1], span.end))

    def piece(span: TraceSpan, begin: int, end: int) -> None:
        if end > begin:
            pieces.append(span._replace(begin=begin, end=end))

    # Outer spans before inner ones that begin at the same time.
    for span in sorted(spans, key=lambda s: (s.begin, -s.end)):
        close(span.begin)
        if stack:
            piece(stack[-1][0], stack[-1][1], span.begin)
        stack.append((span, span.begin))
    close(max((s.end for s in spans), default=0))
    return sorted(pieces, key=lambda s: s.begin)
