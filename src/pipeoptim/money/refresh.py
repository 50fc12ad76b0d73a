"""Today's prices on demand and of spot servers, as a file for ``--prices``, by way of gpuhunt's catalog (MPL-2.0, an extra)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from pipeoptim.errors import ConfigError, PipeOptimError, first_line
from pipeoptim.files import write_durably
from pipeoptim.money.price_book import ACCELERATOR

SOURCE = "https://github.com/dstackai/gpuhunt"

QUOTES = 12
"""Of a price at most: the cheapest offer of each provider."""


def refresh_prices(accelerator: str, path: Path, today: date) -> int:
    """Write what gpuhunt offers of ``accelerator`` into ``path``. Returns how many quotes there are.

    Raises:
        ConfigError: gpuhunt is not installed, or knows no such accelerator.
        PipeOptimError: it could not look them up.
    """
    try:
        import gpuhunt
    except ImportError as error:
        raise ConfigError("prices are looked up by gpuhunt, which is not installed; pip install 'pipeoptim[prices]'") from error
    try:
        offers = list(gpuhunt.query(gpu_name=accelerator))
    except Exception as error:  # whatever a network and a dozen providers raise
        raise PipeOptimError(
            f"gpuhunt could not look prices up ({first_line(error)}); try again, or give your own with --prices"
        ) from error
    tables = {name: _cheapest(offers, spot) for name, spot in (("on_demand", False), ("spot", True))}
    if not any(tables.values()):
        raise ConfigError(f"gpuhunt knows no accelerator {accelerator!r}; use a name as H100, A100 or L40S")
    write_durably(path, _toml(accelerator, tables, today))
    return sum(map(len, tables.values()))


def _cheapest(offers: Iterable[Any], spot: bool) -> list[tuple[float, str]]:
    """USD per accelerator and hour of the cheapest offer of each provider."""
    found: dict[str, tuple[float, str]] = {}
    for offer in offers:
        if bool(offer.spot) == spot and offer.gpu_count and offer.price > 0:
            one = (offer.price / offer.gpu_count, f"{offer.provider} {offer.instance_name} {offer.location}")
            found[offer.provider] = min(one, found.get(offer.provider, one))
    return sorted(found.values())[:QUOTES]


def _toml(accelerator: str, tables: Mapping[str, Sequence[tuple[float, str]]], today: date) -> str:
    lines = [f"# The cheapest offer of each provider, by gpuhunt on {today}; for pipeoptim cost --prices.", ""]
    for name, quotes in tables.items():
        if quotes:
            told = [
                f'  {{value = {price!r}, date = {today}, what = "{_plain(what)}", url = "{SOURCE}"}},' for price, what in quotes
            ]
            lines += [f"[{accelerator.lower()}.{name}]", f'unit = "{ACCELERATOR[name]}"', "quotes = [", *told, "]", ""]
    return "\n".join(lines)


def _plain(text: str) -> str:
    return "".join(c for c in text if c.isprintable() and c not in '"\\')
