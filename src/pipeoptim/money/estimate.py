"""The estimate: every price, failure rate and recovery time drawn from its interval, and what of it matters most."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from math import isfinite
from typing import Any

import numpy as np

from pipeoptim.errors import ConfigError
from pipeoptim.failures import Failures, seconds_with_failures
from pipeoptim.money.places import LINES, PLACES, Bill, Known, RunPlace, UnknownPriceError, bill, break_even, mixed, own_stages
from pipeoptim.money.price_book import PriceBook
from pipeoptim.money.priced_run import PricedRun
from pipeoptim.money.terms import Terms
from pipeoptim.money.triangular import Values

MOST_DRAWS = 100_000

MIX = "own + cloud"


@dataclass(frozen=True)
class Percentiles:
    """Of all draws; infinite where a run does not end."""

    p10: float
    p50: float
    p90: float

    def to_list(self) -> list[float | None]:
        """For JSON, which has no infinity."""
        return [value if isfinite(value) else None for value in (self.p10, self.p50, self.p90)]


@dataclass(frozen=True)
class PlaceEstimate:
    """What one place costs.

    Attributes:
        lines: USD, None where a price is unknown. total: of those that are known; None where the accelerators, most of it, are not.
        unknown: which prices are not.
        energy, carbon: kWh and kg of CO2, None where they are unknown.
        hours: that are paid, failures included.
    """

    name: str
    lines: Mapping[str, Percentiles | None]
    total: Percentiles | None
    unknown: tuple[str, ...]
    energy: Percentiles | None
    carbon: Percentiles | None
    hours: Percentiles

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        lines = {name: None if one is None else one.to_list() for name, one in self.lines.items()}
        rest = {"kWh": self.energy, "kg CO2": self.carbon, "hours": self.hours}
        return {
            "USD": lines,
            "total USD": None if self.total is None else self.total.to_list(),
            "unknown": list(self.unknown),
            **{name: None if one is None else one.to_list() for name, one in rest.items()},
        }


@dataclass(frozen=True)
class Swing:
    """How much of a total hangs on one input: the total where it is low and where it is high (10 % and 90 %), all else being typical."""

    name: str
    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """What a run costs, wherever it may run.

    Attributes:
        hours: of the run without failures.
        places: each with its lines.
        swings: of the place ``swung``, the largest first.
        break_even: share of its time in which own hardware must be used to cost what this place does; None where a price is unknown.
    """

    work: PricedRun
    terms: Terms
    hours: Percentiles
    places: tuple[PlaceEstimate, ...]
    swung: str
    swings: tuple[Swing, ...]
    break_even: Mapping[str, Percentiles | None]

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        even = {name: None if one is None else one.to_list() for name, one in self.break_even.items()}
        return {
            "run": asdict(self.work) | {"devices": self.work.devices, "hours without failures": self.hours.to_list()},
            "terms": asdict(self.terms),
            "percentiles": [10, 50, 90],
            "places": {one.name: one.to_dict() for one in self.places},
            "break-even utilisation against": even,
            "what it hangs on": {"place": self.swung, "swings": [asdict(one) for one in self.swings]},
        }


def estimate(work: PricedRun, book: PriceBook, terms: Terms, draws: int = 1000, seed: int = 0) -> Estimate:
    """Draw prices, failures and recoveries ``draws`` times, and add up.

    Raises:
        ConfigError: nothing is known of the accelerator; numbers that cannot be.
    """
    book.check_accelerator(terms.accelerator)
    if not 1 <= draws <= MOST_DRAWS:
        raise ConfigError(f"draws is {draws}, must be from 1 to {MOST_DRAWS:,}")
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed is {seed}, must be at least 0 and below {2**32:,}")
    model = _Model(work, terms, book)
    random = np.random.default_rng(seed)
    x = model.known({name: span.quantile(random.random(draws)) for name, span in model.spans.items()})
    with np.errstate(invalid="ignore"):
        places = [_summed(name, model.bill(name, x, random), draws) for name in model.places]
    swung = min(places, key=lambda one: (one.total is None, len(one.unknown), 0.0 if one.total is None else one.total.p50)).name
    even = {place.name: _even(x, place, draws) for place in PLACES[:2]}
    return Estimate(work, terms, _percentiles(x["hours"], draws), tuple(places), swung, model.swings(swung), even)


class _Model:
    """What is uncertain, and how a bill follows from it."""

    def __init__(self, work: PricedRun, terms: Terms, book: PriceBook) -> None:
        self.work, self.terms = work, terms
        self.spans = book.spans(terms.accelerator) | {
            "recovery": terms.recovery,
            "minibatches": work.minibatches,
            "seconds": work.seconds,
        }
        self._per_server = book.per_server[terms.accelerator]
        self.places: dict[str, Callable[..., Bill]] = {place.name: partial(self._bill, place) for place in PLACES}
        if work.stages > 1 or terms.own_stages is not None:
            own_stages(work, terms)
            self.places[MIX] = self._mixed

    def known(self, drawn: Mapping[str, Any]) -> Known:
        """Drawn inputs with what follows from them."""
        x = Known(drawn)
        x |= {"life": self.terms.life, "per_server": self._per_server, "hours": x["minibatches"] * x["seconds"] / 3600}
        if self.terms.people is not None:
            x["people"] = self.terms.people
        return x

    def bill(self, name: str, x: Known, random: np.random.Generator | None) -> tuple[Bill, Values]:
        """Of a place, and the hours that are paid; with failures drawn, or by their mean."""
        paid = self._paid(x, random, preempted=any(place.preempted for place in PLACES if place.name == name))
        return self.places[name](x, paid), paid

    def _bill(self, place: RunPlace, x: Known, paid: Values) -> Bill:
        return bill(place, self.work, self.terms, x, x["hours"], paid)

    def _mixed(self, x: Known, paid: Values) -> Bill:
        return mixed(self.work, self.terms, x, x["hours"], paid, x["minibatches"])

    def _paid(self, x: Known, random: np.random.Generator | None, preempted: bool) -> Values:
        """Hours of each draw with its failures."""
        servers = -(-self.work.devices // self._per_server)
        rate = self.work.devices / np.asarray(x["failures.mtbf"]) + (
            servers / np.asarray(x["cloud.preemption"]) if preempted else 0.0
        )
        each = np.broadcast_arrays(rate / 3600, np.asarray(x["hours"]) * 3600, np.asarray(x["recovery"]))
        seconds = [
            seconds_with_failures(
                Failures(1.0, float(recovery), self.terms.checkpoint_every, self.terms.checkpoint), float(r), float(s), random
            )
            for r, s, recovery in zip(*(one.ravel() for one in each), strict=True)
        ]
        return np.maximum(np.asarray(seconds).reshape(each[0].shape) / 3600, x["hours"])

    def swings(self, name: str) -> tuple[Swing, ...]:
        """Of the place ``name``."""
        typical = {key: span.typical for key, span in self.spans.items()}
        found = []
        for key, span in self.spans.items():
            ends = [self.known(typical | {key: float(span.quantile(share))}) for share in (0.1, 0.9)]
            low, high = (float(self.bill(name, x, None)[0].total) for x in ends)
            if isfinite(low) and isfinite(high) and low != high:
                found.append(Swing(key, low, high))
        return tuple(sorted(found, key=lambda one: -abs(one.high - one.low)))


def _summed(name: str, billed: tuple[Bill, Values], draws: int) -> PlaceEstimate:
    one, paid = billed

    def over(values: Any) -> Percentiles | None:
        return None if values is None else _percentiles(values, draws)

    lines = {line: over(one.lines[line]) for line in LINES}
    total = None if lines["accelerators"] is None else over(one.total)
    return PlaceEstimate(name, lines, total, one.unknown, over(one.energy), over(one.carbon), _percentiles(paid, draws))


def _percentiles(values: Any, draws: int) -> Percentiles:
    drawn = np.broadcast_to(np.asarray(values, dtype=np.float64), (draws,))
    drawn = np.where(np.isnan(drawn), 0.0, drawn)  # nothing, in a run that does not end
    return Percentiles(*(float(one) for one in np.quantile(drawn, (0.1, 0.5, 0.9), method="nearest")))


def _even(x: Known, place: RunPlace, draws: int) -> Percentiles | None:
    try:
        shares = np.asarray(break_even(x, place))
    except UnknownPriceError:
        return None
    return _percentiles(np.where(shares > 0, shares, np.inf), draws)
