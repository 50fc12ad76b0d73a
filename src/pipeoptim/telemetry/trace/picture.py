"""Some mini-batches from the middle of a traced run as an SVG, above the ideal schedule of the same actions, on one scale."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from pipeoptim.schedule import Span as IdealSpan
from pipeoptim.telemetry.trace.read import StageTrace, flatten

_WIDTH, _LEFT, _ROW, _BAR, _GAP = 1180, 64, 26, 20, 46
_SHOWN = 24  # forwards of the first stage in the picture

COLOURS = {
    "F": "#9ecae9",
    "B": "#4c78a8",
    "U": "#54a24b",
    "predict": "#b279a2",
    "evaluate": "#72b7b2",
    "send": "#f58518",
    "receive": "#f58518",
    "pack": "#f58518",
    "unpack": "#f58518",
    "wait": "#e6e0d8",
}
_OTHER = "#9d755d"
_LEGEND = (
    ("F", "forward"),
    ("B", "backward"),
    ("U", "update"),
    ("predict", "prediction"),
    ("send", "send, receive"),
    ("wait", "waiting"),
    ("", "other work"),
)


class Bar(NamedTuple):
    """A thing to draw: on row ``k``, from ``begin`` to ``end``."""

    k: int
    what: str
    number: int
    begin: float
    end: float


def picture(stages: Sequence[StageTrace], ideal: Sequence[IdealSpan], title: str = "measured") -> str:
    """A self-contained SVG; stages are aligned, and ``title`` says what they are of.

    Numbers are mini-batches. Empty space is time in which a stage did nothing that was recorded.
    """
    run = [Bar(s.stage, p.what, p.number, p.begin, p.end) for s in stages for p in flatten(s.spans)]
    best = [Bar(s.k, s.action.kind.value, s.action.number, s.start, s.end) for s in ideal]
    # Stages that take turns in one process need more time on the picture, so fewer forwards are shown.
    mates = sum(s.process == stages[0].process for s in stages)
    panels = [
        (f"{title}: {stages[0].method}", *_window(run, mates)),
        ("ideal schedule of the same actions", *_window(best, mates)),
    ]
    longest = max(end - begin for _, _, begin, end in panels) or 1.0
    scale = (_WIDTH - _LEFT - 8) / longest
    tall = _GAP + _ROW * len(stages)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {2 * tall + 24}" width="{_WIDTH}" role="img" '
        f'aria-label="{title} and ideal schedule" font-family="system-ui, sans-serif" font-size="11">',
        "<style>.ink{fill:#222}@media (prefers-color-scheme: dark){.ink{fill:#ddd}}</style>",
    ]
    for n, (title, bars, begin, end) in enumerate(panels):
        parts += _panel(title, bars, begin, end, scale, tall * n, len(stages), stages[0].microbatches)
    return "\n".join([*parts, *_legend(2 * tall), "</svg>"]) + "\n"


def _window(bars: list[Bar], mates: int) -> tuple[list[Bar], float, float]:
    """The bars around some forwards of stage 0 in the middle of the run, and from when to when they are."""
    forwards = sorted(b.begin for b in bars if b.k == 0 and b.what == "F")
    if not forwards:
        return [], 0.0, 0.0
    shown = min(len(forwards), max(4, _SHOWN // mates))
    first = (len(forwards) - shown) // 2
    begin = forwards[first]
    end = forwards[first + shown] if first + shown < len(forwards) else max(b.end for b in bars)
    return [b for b in bars if b.end > begin and b.begin < end], begin, end


def _panel(title: str, bars: list[Bar], begin: float, end: float, scale: float, top: float, depth: int, m: int) -> list[str]:
    right = _LEFT + (end - begin) * scale
    said = f"{escape(title)}, {(end - begin) / 1e6:.2f} ms"
    parts = [f'<text class="ink" x="4" y="{top + 15}" font-size="13">{said}</text>']
    for k in range(depth):
        y = top + 24 + _ROW * k
        parts.append(f'<text class="ink" x="4" y="{y + 14}">stage {k}</text>')
        parts.append(
            f'<line class="ink" x1="{_LEFT}" x2="{right:.1f}" y1="{y + _BAR + 2}" y2="{y + _BAR + 2}" stroke="#8884"/>'
        )
    for bar in bars:
        x, until = (_LEFT + (max(begin, min(end, t)) - begin) * scale for t in (bar.begin, bar.end))
        parts.append(_bar(bar, x, until - x, top + 24 + _ROW * bar.k, m))
    return parts


def _bar(bar: Bar, x: float, width: float, y: float, m: int) -> str:
    colour, label = COLOURS.get(bar.what, _OTHER), ""
    number = bar.number // m if bar.what in ("F", "B") else bar.number
    if bar.what in ("F", "B") and width > 6 * len(str(number)) + 3:
        ink = "#fff" if bar.what == "B" else "#222"
        label = f'<text x="{x + width / 2:.1f}" y="{y + 14}" fill="{ink}" text-anchor="middle">{number}</text>'
    told = f"{bar.what} {number}" if number >= 0 else bar.what
    return (
        f"<g><title>stage {bar.k}: {escape(told)}, {(bar.end - bar.begin) / 1e3:.0f} µs</title>"
        f'<rect x="{x:.1f}" y="{y:g}" width="{max(width, 0.4):.1f}" height="{_BAR}" fill="{colour}"/>{label}</g>'
    )


def _legend(y: float) -> list[str]:
    parts, x = [], float(_LEFT)
    for what, meaning in _LEGEND:
        parts.append(f'<rect x="{x:g}" y="{y}" width="12" height="12" fill="{COLOURS.get(what, _OTHER)}"/>')
        parts.append(f'<text class="ink" x="{x + 16:g}" y="{y + 10}">{meaning}</text>')
        x += 40 + 6.5 * len(meaning)
    return parts
