"""A partition as an SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from pipeoptim.partitioning.stage_row import StageRow

_COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2", "#9d755d", "#bab0ac")
_LEFT, _WIDTH, _ROW, _TOP = 16, 640, 76, 34


def to_svg(rows: Sequence[StageRow]) -> str:
    """Per stage: its words, its blocks as wide as they take (F light, B dark), and its memory as a thin bar."""
    slowest = max(row.seconds for row in rows) or 1.0
    largest = max(row.memory_bytes for row in rows) or 1
    height = _TOP + _ROW * len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_LEFT * 2 + _WIDTH} {height}" font-family="sans-serif" '
        'font-size="12" role="img" aria-label="Stages with their blocks, time and memory">',
        f'<rect width="{_LEFT * 2 + _WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="20" fill="#555555">a box per block: forward light, backward dark; below it the memory</text>',
    ]
    for row in rows:
        parts += _stage(row, _WIDTH * row.seconds / slowest, _WIDTH * row.memory_bytes / largest)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _stage(row: StageRow, width: float, memory: float) -> list[str]:
    y, colour = _TOP + _ROW * row.k, _COLOURS[row.k % len(_COLOURS)]
    words = escape(" ".join(f"stage {row.k}: {row.words()}".split()))
    parts = [f'<text x="{_LEFT}" y="{y + 14}">{words}</text>']
    x, whole = float(_LEFT), sum(c.seconds for c in row.blocks) or 1.0
    for block in row.blocks:
        title = f"{escape(block.name)}: F {block.forward * 1e3:.2f} ms, B {block.backward * 1e3:.2f} ms"
        parts.append(f"<g><title>{title}</title>")
        for seconds, opacity in ((block.forward, 0.5), (block.backward, 1.0)):
            wide = width * seconds / whole
            parts.append(
                f'<rect x="{x:.1f}" y="{y + 20}" width="{wide:.1f}" height="26" fill="{colour}" fill-opacity="{opacity}"/>'
            )
            x += wide
        parts.append(f'<path d="M{x:.1f} {y + 20}v26" stroke="#ffffff"/></g>')
    parts.append(f'<rect x="{_LEFT}" y="{y + 49}" width="{memory:.1f}" height="6" fill="#888888"/>')
    return parts
