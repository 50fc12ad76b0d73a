"""A result as a picture that documents carry: horizontal bars in SVG, one per row."""

from __future__ import annotations

from html import escape

from pipeoptim.bench.record import Record

_ROW, _LEFT, _WIDTH, _TOP = 22, 250, 640, 30


def bars(title: str, values: list[tuple[str, float, bool]]) -> str:
    """One bar per (name, value, ours), as long as its value.

    >>> bars("speed", [("this", 2.0, True), ("that", 1.0, False)]).count("<rect")
    2
    """
    most = max((value for _, value, _ in values), default=1.0)
    height = _TOP + _ROW * len(values) + 6
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" role="img" '
        f'aria-label="{escape(title)}" font-family="system-ui, sans-serif" font-size="12">',
        "<style>.ink{fill:#222}@media (prefers-color-scheme: dark){.ink{fill:#ddd}}</style>",
        f'<text class="ink" x="4" y="16" font-size="13">{escape(title)}</text>',
    ]
    for n, (name, value, ours) in enumerate(values):
        y, length = _TOP + _ROW * n, value / most * (_WIDTH - _LEFT - 60)
        parts.append(f'<text class="ink" x="{_LEFT - 8}" y="{y + 14}" text-anchor="end">{escape(name)}</text>')
        parts.append(
            f'<rect x="{_LEFT}" y="{y + 2}" width="{length:.1f}" height="16" fill="{"#4c78a8" if ours else "#bab0ac"}"/>'
        )
        parts.append(f'<text class="ink" x="{_LEFT + length + 6:.1f}" y="{y + 14}">{value:.2f}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def throughput_bars(record: Record, model: str, batch: int) -> str:
    """Every contender of one model and mini-batch at its best M, over the best of torch."""
    rows = [row for row in record.rows if (row.settings["model"], row.settings["batch"]) == (model, batch)]
    rival = max(row.median for row in rows if not row.settings["ours"])
    best: dict[tuple[str, bool], float] = {}
    for row in rows:
        key = ("" if row.settings["ours"] else "torch ") + row.settings["method"], row.settings["ours"]
        best[key] = max(best.get(key, 0.0), row.median / rival)
    ordered = sorted(((name, value, ours) for (name, ours), value in best.items()), key=lambda bar: -bar[1])
    return bars(f"{model}, mini-batch {batch}: samples per second, the best of torch = 1", ordered)


def growth_bars(record: Record, grows: str) -> str:
    """Of ``pipeoptim bench scaling``: a bar per size for the pipeline, and one for the plain loop."""
    values = []
    for row in record.rows:
        s = row.settings
        if s["grows"] == grows:
            ours = s["contender"] == "pipeline"
            name = f"{grows} = {s[grows]}, {'pipeline' if ours else 'without a pipeline'}"
            values.append((name, row.median / s["D"] / s["M"], ours))
    return bars("ms per stage and micro-batch of small layers, all stages in one process", values)
