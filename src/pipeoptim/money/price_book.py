"""Prices as they were read somewhere: each a list of quotes with source and date, from the package and from a file of one's own."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import date
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

from pipeoptim.errors import ConfigError, counted, did_you_mean, unknown_name
from pipeoptim.files import cause_of, read_text
from pipeoptim.money.triangular import Triangular

OLD = 90
"""Days after which a quote should be looked up again."""

MOST = 1e15
"""Dollars, hours, kW: beyond anything that there is."""

ACCELERATOR = {
    "on_demand": "USD/accelerator/hour",
    "spot": "USD/accelerator/hour",
    "server": "USD/server",
    "power": "kW/server",
}
"""What an accelerator's table may hold, and its unit."""

GENERAL = {
    "cloud.reserved_discount": "share",
    "cloud.storage": "USD/GB/month",
    "cloud.egress": "USD/GB",
    "cloud.pue": "ratio",
    "cloud.preemption": "hours/server",
    "own.server_over_accelerators": "ratio",
    "own.interconnect": "USD/USD of servers",
    "own.pue": "ratio",
    "own.electricity": "USD/kWh",
    "own.storage": "USD/GB/month",
    "staff.salary": "USD/person/year",
    "grid.carbon": "kg CO2/kWh",
    "failures.mtbf": "accelerator hours",
}
"""The other prices, and their units."""

LEAST = {"cloud.pue": 1.0, "own.pue": 1.0, "own.server_over_accelerators": 1.0, "failures.mtbf": 1e-3, "cloud.preemption": 1e-3}
"""Of those that cannot be 0."""

GENERAL_TABLES = {name.partition(".")[0] for name in GENERAL}


@dataclass(frozen=True)
class Quote:
    """What something costs according to ``url`` on ``day``; both None in a file of one's own that does not say it."""

    value: float
    day: date | None = None
    url: str | None = None
    what: str = ""


@dataclass(frozen=True)
class Price:
    """All quotes of one price, at least one."""

    name: str
    unit: str
    quotes: tuple[Quote, ...]

    @property
    def span(self) -> Triangular:
        """From the lowest to the highest quote, by the median."""
        values = [quote.value for quote in self.quotes]
        return Triangular(min(values), median(values), max(values))


@dataclass(frozen=True)
class PriceBook:
    """All prices that are known.

    Attributes:
        prices: by name, as "cloud.egress" or "h100.spot".
        per_server: accelerators of a server, by accelerator.
    """

    prices: Mapping[str, Price]
    per_server: Mapping[str, int]

    def check_accelerator(self, name: str) -> None:
        """Raises ConfigError where nothing is known of it."""
        if name not in self.per_server:
            raise unknown_name("accelerator", name, self.per_server, "; others may be tables of a file of your own (--prices)")

    def spans(self, accelerator: str) -> dict[str, Triangular]:
        """What is known, the prices of ``accelerator`` by their names alone."""
        own = {name: f"{accelerator}.{name}" for name in ACCELERATOR}
        own |= {name: name for name in GENERAL}
        return {name: self.prices[key].span for name, key in own.items() if key in self.prices}

    def warnings(self, accelerator: str, today: date) -> list[str]:
        """Sentences about what is old."""
        used = [price for name, price in self.prices.items() if name in GENERAL or name.startswith(f"{accelerator}.")]
        days = [(quote.day, price.name) for price in used for quote in price.quotes if quote.day is not None]
        old = sorted((day, name) for day, name in days if (today - day).days > OLD)
        if not old:
            return []
        names = list(dict.fromkeys(name for _, name in old))
        return [
            f"{counted(len(old), 'quote')} of {len(days)} are older than {OLD} days (the oldest, of {old[0][1]}, is of {old[0][0]}); "
            f"look {', '.join(names)} up and give your own with --prices"
        ]

    def to_dict(self, accelerator: str) -> dict[str, Any]:
        """What was used, with its sources."""
        return {
            name: {
                "unit": price.unit,
                "quotes": [asdict(quote) | {"day": quote.day and str(quote.day)} for quote in price.quotes],
            }
            for name, price in self.prices.items()
            if name in GENERAL or name.startswith(f"{accelerator}.")
        }


def read_prices(path: Path | None = None) -> PriceBook:
    """The package's prices, each replaced by that of the file at ``path`` where it has one.

    Raises:
        ConfigError: the file cannot be read, or names a price, a unit or a value that there is not.

    Example:
        >>> read_prices().prices["own.electricity"].unit
        'USD/kWh'
    """
    own = _read(files("pipeoptim.money").joinpath("prices.toml").read_text(encoding="utf-8"), "prices.toml")
    if path is None:
        return own
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        cause = cause_of(error) if isinstance(error, OSError) else error
        raise ConfigError(
            f"the prices {path} cannot be read ({cause}); give a TOML file like the package's prices.toml"
        ) from error
    given = _read(text, str(path))
    return PriceBook({**own.prices, **given.prices}, {**own.per_server, **given.per_server})


def _read(text: str, where: str) -> PriceBook:
    try:
        tables = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"the prices {where} are no TOML ({error}); see the package's prices.toml") from error
    prices, per_server = {}, {}
    for table, entries in tables.items():
        if not isinstance(entries, dict):
            raise ConfigError(f"{table} in {where} is {entries!r}, must be a table such as [cloud.egress] or [h100.on_demand]")
        for entry, data in entries.items():
            name = f"{table}.{entry}"
            if entry == "per_server" and table not in GENERAL_TABLES:
                per_server[table] = _count(data, name, where)
                continue
            unit = _unit(table, entry, where)
            quotes = _quotes(data, name, unit, where)
            if quotes:
                prices[name] = Price(name, unit, quotes)
    accelerators = {name.partition(".")[0] for name in prices} - GENERAL_TABLES
    return PriceBook(prices, {name: per_server.get(name, 8) for name in sorted(accelerators | set(per_server))})


def _unit(table: str, entry: str, where: str) -> str:
    name = f"{table}.{entry}"
    unit = GENERAL.get(name) if table in GENERAL_TABLES else ACCELERATOR.get(entry)
    if unit is None:
        known = GENERAL if table in GENERAL_TABLES else [f"{table}.{one}" for one in (*ACCELERATOR, "per_server")]
        raise ConfigError(
            f"{where} has a price {name!r}, which means nothing{did_you_mean(name, known) or ';'} known: {', '.join(known)}"
        )
    return unit


def _quotes(data: Any, name: str, unit: str, where: str) -> tuple[Quote, ...]:
    quotes = data.get("quotes") if isinstance(data, dict) else None
    if not isinstance(quotes, list) or set(data) - {"unit", "quotes"}:
        raise ConfigError(f'{name} in {where} is {data!r}, must be a table: unit = "{unit}" and quotes = [{{value = 1.0}}]')
    if data.get("unit") != unit:
        raise ConfigError(f"{name} in {where} is in {data.get('unit')!r}, must be in {unit!r}; convert it")
    return tuple(_quote(one, name, unit, where) for one in quotes)


def _quote(data: Any, name: str, unit: str, where: str) -> Quote:
    value = data.get("value") if isinstance(data, dict) else data
    day, url, what = (data.get(key) if isinstance(data, dict) else None for key in ("date", "url", "what"))
    least, most = LEAST.get(name, 0.0), 0.99 if unit == "share" else MOST
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise ConfigError(f"{name} in {where} is {value!r} {unit}, must be a number from {least:g} to {most:g}")
    # A datetime is a date as well, but has no age in days.
    if type(day) not in (date, type(None)) or not all(isinstance(one, (str, type(None))) for one in (url, what)):
        raise ConfigError(
            f"{name} in {where} has a quote {data!r}, must have a date = 2026-11-30 and text for url and what, or none"
        )
    return Quote(float(value), day, url, what or "")


def _count(value: Any, name: str, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1024:
        raise ConfigError(f"{name} in {where} is {value!r}, must be how many accelerators a server has, 1 to 1024")
    return value
