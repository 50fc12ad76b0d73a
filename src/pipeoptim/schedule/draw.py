"""A schedule as a picture: text for the terminal, SVG for documents."""

from __future__ import annotations

from html import escape

from pipeoptim.errors import counted
from pipeoptim.schedule.actions import ActionKind
from pipeoptim.schedule.program import Program
from pipeoptim.schedule.slack import describe_slack
from pipeoptim.schedule.timeline import Span, timeline

_COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2", "#9d755d", "#bab0ac")
_UNIT, _ROW, _LEFT, _TOP, _LEGEND = 26, 30, 88, 24, 380


def to_text(program: Program, minibatches: int, width: int | None = None) -> str:
    """The schedule as one line of text per stage: F takes one cell, B two (``=`` its second half), ``.`` is idle.

    Micro-batches are numbered from 0; a ``'`` before a cell marks an update of the stage's weights. Where several stages share
    a process, which works on one of them at a time, the process stands beside the stage.

    Args:
        program: what to draw.
        minibatches: mini-batches fed before the drain.
        width: cut every line after this many characters.

    Example:
        >>> print(to_text(Program("async_1f1b", 2), 2))
        stage 0 | F0  F1  .   .   B0  == '.   B1  == '
        stage 1 | .   F0  B0  == 'F1  B1  == '.   .
    """
    spans = timeline(program, minibatches)
    cell = 2 + len(str(minibatches * program.microbatches - 1))
    # Whole numbers: F lasts 1 and B 2 units here.
    length = int(max(s.end for s in spans))
    lines = []
    for k in range(program.depth):
        cells = [".".ljust(cell)] * length
        updates = set()
        for span in (s for s in spans if s.k == k):
            start = int(span.start)
            if span.action.kind is ActionKind.U:
                updates.add(start)
                continue
            cells[start] = str(span.action).ljust(cell)
            for t in range(start + 1, int(span.end)):
                cells[t] = ("=" * (cell - 1)).ljust(cell)
        row = "".join(("'" if t in updates else " ") + c for t, c in enumerate(cells))
        # An update at the very end has no cell behind it.
        row += "'" if length in updates else ""
        line = f"{_label(program, k)} |{row}".rstrip()
        lines.append(line if width is None else line[:width])
    return "\n".join(lines)


def to_svg(program: Program, minibatches: int, title: str = "") -> str:
    """The schedule as a self-contained SVG: one row per stage, a colour per mini-batch, forwards fainter than backwards.

    Example:
        >>> to_svg(Program("gpipe", 2, 2), 1).startswith("<svg")
        True
    """
    spans = timeline(program, minibatches)
    length = max(s.end for s in spans)
    width, height = max(_LEFT + _UNIT * length + 12, _LEGEND), _TOP + _ROW * program.depth + 26
    slack = f", slack {describe_slack(program.slack)}" if program.slack else ""
    name = escape(
        title or f"{program.order}, {counted(program.depth, 'stage')}, {counted(program.microbatches, 'micro-batch')}{slack}"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img" '
        f'aria-label="{name}" font-family="system-ui, sans-serif" font-size="11">',
        "<style>.ink{fill:#222}@media (prefers-color-scheme: dark){.ink{fill:#ddd}}</style>",
        f'<text class="ink" x="4" y="14" font-size="12">{name}</text>',
    ]
    for k in range(program.depth):
        parts.append(f'<text class="ink" x="4" y="{_TOP + _ROW * k + 18}">{_label(program, k)}</text>')
    parts += [_svg_span(s, program.microbatches) for s in spans]
    legend = _TOP + _ROW * program.depth + 16
    parts.append(
        f'<text class="ink" x="{_LEFT}" y="{legend}">faint: forward &#160; strong: backward &#160; '
        "&#9650; update &#160; number: micro-batch</text>"
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _label(program: Program, k: int) -> str:
    return f"stage {k} on {program.process_of(k)}" if program.interleaved else f"stage {k}"


def _svg_span(span: Span, m: int) -> str:
    kind, index = span.action
    x, y = _LEFT + _UNIT * span.start, _TOP + _ROW * span.k
    if kind is ActionKind.U:
        return f'<path class="ink" d="M{x - 4:g} {y + 29} l4 -6 l4 6z"/>'
    colour = _COLOURS[(index // m) % len(_COLOURS)]
    opacity, ink = ("0.45", 'class="ink"') if kind is ActionKind.F else ("1", 'fill="#fff"')
    w = _UNIT * (span.end - span.start)
    return (
        f'<g><title>stage {span.k}: {span.action}</title><rect x="{x:g}" y="{y}" width="{w - 1:g}" height="22" rx="3" '
        f'fill="{colour}" fill-opacity="{opacity}"/>'
        f'<text {ink} x="{x + w / 2 - 0.5:g}" y="{y + 15}" text-anchor="middle">{index}</text></g>'
    )
