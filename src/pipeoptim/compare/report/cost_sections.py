"""What a plan costs, from a file of ``pipeoptim cost``, and what a run has cost so far: sections of their pages. Texts are escaped here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from pipeoptim.compare.report.plan_sections import bar, definitions, known_totals, table
from pipeoptim.errors import counted
from pipeoptim.files import read_object

SWINGS = 10
"""Bars of a chart at most."""

NEVER = "never ends"

UNITS = {
    "life": "years",
    "stored": "GB",
    "sent": "GB",
    "recovery": "s",
    "checkpoint_every": "s",
    "checkpoint": "s",
    "people": "full time",
    "utilisation": "share of the time",
}
"""Of terms."""


def cost(data: Mapping[str, Any]) -> str:
    """Eight lines, a column for each place; totals with their intervals."""
    places = data["places"]
    lines = list(next(iter(places.values()))["USD"])
    rows = [(line, [_line(place["USD"][line]) for place in places.values()]) for line in lines]
    for name, part in (("total, 10 %", 0), ("total, 50 %", 1), ("total, 90 %", 2)):
        rows.append((name, [_total(place, part) for place in places.values()]))
    for name in ("kWh", "kg CO2", "hours"):
        rows.append((name, [_line(place[name]) for place in places.values()]))
    body = "".join(
        f"<tr><th scope=row>{escape(name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" for name, cells in rows
    )
    findings = "".join(f"<li>{escape(one)}</li>" for one in (*data["findings"], *data["warnings"]))
    return (
        f"<section><h2>Cost</h2><p>USD; medians of {data['draws']:,} draws of prices, failures and recoveries. Hosts and power are in the "
        f"price of a cloud; * is without what is unknown.</p>{table(('USD', *places), body, 'Cost')}"
        f"<ul class=notes>{findings}</ul></section>"
    )


def _total(place: Mapping[str, Any], part: int) -> str:
    if place["total USD"] is None:
        return "unknown"
    return _figure(place["total USD"][part]) + "*" * bool(place["unknown"])


def totals(data: Mapping[str, Any]) -> str:
    """The totals of all places on one scale, from 10 to 90 %."""
    known = known_totals(data)
    most = max((one[2] for one in known.values()), default=0.0) or 1.0
    body = "".join(
        _row(name, one[0], one[2], 0.0, most, f"{_figure(one[0])} to {_figure(one[2])}") for name, one in known.items()
    )
    return f"<section><h2>Where it costs how much</h2>{table(('place', 'total, 10 to 90 %', 'USD'), body, 'Totals')}</section>"


def hangs_on(data: Mapping[str, Any]) -> str:
    """How far the total moves with each input."""
    swings, place = data["what it hangs on"]["swings"][:SWINGS], data["what it hangs on"]["place"]
    if not swings:
        return ""
    ends = [(min(one["low"], one["high"]), max(one["low"], one["high"])) for one in swings]
    least, most = min(low for low, _ in ends), max(high for _, high in ends)
    body = "".join(
        _row(one["name"], low, high, least, most, f"{_figure(one['low'])} to {_figure(one['high'])}")
        for one, (low, high) in zip(swings, ends, strict=True)
    )
    return (
        f"<section><h2>What it hangs on</h2><p>The total of {escape(place)!s} where one input is low (its 10 % point) and where it is high "
        f"(90 %), all others being typical.</p>{table(('input', 'total', 'USD'), body, 'Inputs')}</section>"
    )


def terms(data: Mapping[str, Any]) -> str:
    """What was assumed, and where the prices come from."""
    told = {
        name.replace("_", " "): f"{_term(value)} {UNITS.get(name, '')}"
        for name, value in data["terms"].items()
        if value is not None
    }
    body = "".join(_price(name, price) for name, price in data["prices"].items())
    prices = table(("price", "unit", "value", "of", "what", "source"), body, "Prices")
    return (
        f"<section><h2>Assumptions and sources</h2><dl class=setup>{definitions(told)}</dl>"
        f"<details><summary>All prices</summary>{prices}</details></section>"
    )


def account(path: Path) -> str:
    """What the run in ``path`` has cost by its cost meter, beside the estimate if it was given one; empty where it had none."""
    if not (path / "cost.json").exists():
        return ""
    found = read_object(path / "cost.json")
    expected = found.get("estimated", {})
    rows = ""
    for name in ("USD", "kWh", "hours"):
        low, middle, high = expected.get(name) or (None, None, None)
        told = "" if low is None or high is None else f"{_figure(middle)} ({_figure(low)} to {_figure(high)})"
        actual = "unknown" if found[name] is None else _figure(found[name])
        rows += f"<tr><th scope=row>{name}</th><td>{actual}</td><td>{told}</td></tr>"
    return (
        f"<section><h2>Cost</h2><p>{counted(found['devices'], 'device')}, {counted(found['sessions'], 'session')}.</p>"
        f"{table(('', 'so far', 'estimated'), rows, 'Cost')}</section>"
    )


def _row(name: str, low: float, high: float, least: float, most: float, told: str) -> str:
    width = (most - least) or 1.0
    drawn = bar([("", (low - least) / width), ("rest", max(0.004, (high - low) / width))])
    return f"<tr><th scope=row>{escape(name)}</th><td class=wide>{drawn}</td><td>{escape(told)}</td></tr>"


def _price(name: str, price: Mapping[str, Any]) -> str:
    rows = ""
    for quote in price["quotes"]:
        url = quote["url"] or ""
        link = f'<a href="{escape(url)}">{escape(url[:60])}</a>' if url.startswith("https://") else escape(url) or "your own"
        cells = (escape(price["unit"]), f"{quote['value']:g}", escape(quote["day"] or ""), escape(quote["what"]), link)
        rows += f"<tr><th scope=row>{escape(name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    return rows


def _term(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{value['typical']:.4g} ({value['low']:g} to {value['high']:g})"
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


def _line(percentiles: Sequence[float | None] | None) -> str:
    return "unknown" if percentiles is None else _figure(percentiles[1])


def _figure(value: float | None) -> str:
    if value is None:
        return NEVER
    return f"{value:,.0f}" if value >= 100 or value == 0 else f"{value:.3g}"
