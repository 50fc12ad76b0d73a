"""What ``pipeoptim cost`` prints: a table of the places, a chart of what the total hangs on, and sentences."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING

from pipeoptim.errors import counted

if TYPE_CHECKING:
    from pipeoptim.money.estimate import Estimate, Percentiles, PlaceEstimate, Swing

BAR = 40
"""Characters of the longest bar."""

SWINGS = 8
"""That a chart shows."""


def show_estimate(found: Estimate) -> None:
    """Print it."""
    from rich.table import Table

    from pipeoptim.money.places import LINES
    from pipeoptim.telemetry.console import table_console

    work, terms = found.work, found.terms
    print(
        f"{work.model} with {work.method}, {counted(work.devices, 'device')} priced as {terms.accelerator}: "
        f"{work.samples.typical:,.0f} samples in {hours_words(found.hours.p50)} without failures"
    )
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")  # fits into 80 columns
    table.add_column("USD, median")
    for one in found.places:
        table.add_column(one.name, justify="right")
    for line in LINES:
        table.add_row(line, *(_cell(one, line) for one in found.places))
    for name, part in (("total, 10 %", "p10"), ("total, 50 %", "p50"), ("total, 90 %", "p90")):
        table.add_row(name, *(_total(one, part) for one in found.places), style="bold")
    for what, unit in (("energy", "kWh"), ("carbon", "kg CO2")):
        table.add_row(unit, *(_plain(getattr(one, what)) for one in found.places))
    table.add_row("hours with failures", *(_plain(one.hours) for one in found.places))
    table_console().print(table)
    for sentence in sentences(found):
        print(sentence)
    print(f"what the total {found.swung!r} hangs on: USD where the input is low (10 %) and high (90 %), all else being typical")
    for row in tornado(found.swings[:SWINGS]):
        print(row)


def _cell(place: PlaceEstimate, line: str) -> str:
    value = place.lines[line]
    if value is None:
        return "unknown"
    included = not place.name.startswith("own") and line in ("hosts", "power and cooling")
    return "in price" if included else usd(value.p50)


def _total(place: PlaceEstimate, part: str) -> str:
    if place.total is None:
        return "unknown"
    return usd(getattr(place.total, part)) + ("*" if place.unknown else "")


def sentences(found: Estimate) -> list[str]:
    """What is unknown, and from which use on own hardware is cheaper."""
    told = []
    missing: dict[str, list[str]] = {}
    for place in found.places:
        for name in place.unknown:
            missing.setdefault(name, []).append(place.name)
    for name, places in missing.items():
        how = "give --people" if name == "people" else f"give {name} with --prices"
        told.append(f"* without {name}, which is unknown ({', '.join(places)}): {how}")
    for name, share in found.break_even.items():
        if share is not None:
            low, middle, high = (_share(one) for one in (share.p10, share.p50, share.p90))
            told.append(f"own hardware costs as much as {name} where it is used {middle} of its time ({low} to {high})")
    return told


def _share(value: float) -> str:
    return "more than all" if value > 1 else f"{value:.0%}"


def tornado(swings: tuple[Swing, ...]) -> list[str]:
    """A bar for each input, from the total where it is low to that where it is high, on one scale.

    >>> from pipeoptim.money.estimate import Swing
    >>> for row in tornado((Swing("on_demand", 0.0, 40.0), Swing("recovery", 10.0, 20.0))):
    ...     print(row)
    on_demand  ████████████████████████████████████████  0.00 to 40.0
    recovery             ██████████                      10.0 to 20.0
    """
    if not swings:
        return []
    ends = [(min(one.low, one.high), max(one.low, one.high)) for one in swings]
    least, most = min(low for low, _ in ends), max(high for _, high in ends)
    width = max(len(one.name) for one in swings)
    rows = []
    for one, (low, high) in zip(swings, ends, strict=True):
        begin = round(BAR * (low - least) / (most - least))
        length = max(1, round(BAR * (high - least) / (most - least)) - begin)
        bar = f"{' ' * min(begin, BAR - 1)}{'█' * length}"
        rows.append(f"{one.name:<{width}}  {bar:<{BAR}}  {usd(one.low)} to {usd(one.high)}")
    return rows


def usd(value: float) -> str:
    """Three digits, or whole dollars.

    >>> usd(1234.5), usd(0.0123), usd(0.0), usd(float("inf"))
    ('1,234', '0.0123', '0.00', 'never ends')
    """
    if not isfinite(value):
        return "never ends"
    if value >= 100 or value == 0:
        return f"{value:,.0f}" if value else "0.00"
    return f"{value:#.3g}".rstrip(".")


def hours_words(hours: float) -> str:
    """In the unit that suits it.

    >>> hours_words(0.5), hours_words(30.0), hours_words(1000.0)
    ('30 minutes', '30.0 hours', '41.7 days')
    """
    return f"{hours * 60:.2g} minutes" if hours < 1 else f"{hours:.1f} hours" if hours < 72 else f"{hours / 24:.1f} days"


def _plain(value: Percentiles | None) -> str:
    return "unknown" if value is None else usd(value.p50)
