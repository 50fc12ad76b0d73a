"""Where a run may be carried out, and what it costs there: eight lines, each a formula of prices, hours and devices.

With N accelerators that work H hours and are paid W >= H hours, since failures and lost work take the rest, a price p per hour each, i the
share of H in which they wait in the pipeline, and u the share of its time in which own or reserved hardware is used at all:

    accelerators  N H p (1 - i)                    failures and lost work  N (W - H) p / u
    idle time     N H p (i + 1/u - 1)              power and cooling       N H kW PUE USD/kWh

A price of own hardware per hour is what it cost over the hours of its life.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeoptim.errors import ConfigError
from pipeoptim.money.priced_run import PricedRun
from pipeoptim.money.terms import Terms

HOURS_A_YEAR = 8766.0
HOURS_A_MONTH = HOURS_A_YEAR / 12
GB = 1e9

LINES = (
    "accelerators",
    "hosts",
    "storage",
    "network and egress",
    "power and cooling",
    "staff",
    "failures and lost work",
    "idle time",
)

Amount = Any
"""A number, or one for each draw."""


class UnknownPriceError(KeyError):
    """No source and no file says it."""


class Known(dict[str, Amount]):
    """What is known, by name; asking for anything else says that it is unknown."""

    def __missing__(self, name: str) -> Amount:
        raise UnknownPriceError(name)


@dataclass(frozen=True)
class Bill:
    """What one place asks.

    Attributes:
        lines: in USD, None where it is unknown.
        unknown: prices that were missing.
        energy, carbon: kWh and kg of CO2, None where they are unknown.
    """

    lines: Mapping[str, Amount]
    unknown: tuple[str, ...]
    energy: Amount
    carbon: Amount

    @property
    def total(self) -> Amount:
        """Of the lines that are known."""
        return sum(value for value in self.lines.values() if value is not None)


@dataclass(frozen=True)
class RunPlace:
    """A way to get accelerators.

    Attributes:
        name: as it is told.
        hour: USD for an hour of one accelerator, of what is known.
        committed: whether it is paid for when it is not used.
        own: whether hosts, network and power are paid for by themselves.
        preempted: whether servers are taken away.
    """

    name: str
    hour: Callable[[Known], Amount]
    committed: bool = False
    own: bool = False
    preempted: bool = False


def own_accelerator(x: Known) -> Amount:
    """USD for an hour of an accelerator that was bought."""
    return x["server"] / x["own.server_over_accelerators"] / x["per_server"] / (x["life"] * HOURS_A_YEAR)


def own_host(x: Known) -> Amount:
    """USD for an hour of the rest of its server."""
    return own_accelerator(x) * (x["own.server_over_accelerators"] - 1)


def own_network(x: Known) -> Amount:
    """USD for an hour of its share of switches and cables."""
    return own_accelerator(x) * x["own.server_over_accelerators"] * x["own.interconnect"]


def own_power(x: Known) -> Amount:
    """USD for an hour of its power and cooling."""
    return x["power"] / x["per_server"] * x["own.pue"] * x["own.electricity"]


ON_DEMAND = RunPlace("on demand", lambda x: x["on_demand"])
OWN = RunPlace("own", own_accelerator, committed=True, own=True)
PLACES = (
    ON_DEMAND,
    RunPlace("reserved", lambda x: x["on_demand"] * (1 - x["cloud.reserved_discount"]), committed=True),
    RunPlace("spot", lambda x: x["spot"], preempted=True),
    OWN,
)


def bill(
    place: RunPlace, work: PricedRun, terms: Terms, x: Known, hours: Amount, paid: Amount, devices: int | None = None
) -> Bill:
    """What ``place`` asks for ``devices`` of the plan.

    Args:
        x: prices, and "life" and "per_server".
        hours: H of work.
        paid: W of work, failures and work done again.
        devices: N; all of the plan by default.
    """
    count = work.devices if devices is None else devices
    rate = (1 / terms.utilisation if place.committed else 1.0) - 1
    stored = terms.stored + terms.kept_checkpoints * work.checkpoint_bytes / GB
    hardware = (own_accelerator, own_host, own_network) if place.own else (place.hour,)

    def lost() -> Amount:
        return count * (paid - hours) * (sum(one(x) for one in hardware) * (1 + rate) + (own_power(x) if place.own else 0.0))

    def idle() -> Amount:
        return count * hours * (place.hour(x) * work.idle + sum(one(x) for one in hardware) * rate)

    formulas: dict[str, Callable[[], Amount]] = {
        "accelerators": lambda: count * hours * place.hour(x) * (1 - work.idle),
        "hosts": lambda: count * hours * own_host(x) if place.own else 0.0,
        "storage": lambda: stored * x["own.storage" if place.own else "cloud.storage"] * paid / HOURS_A_MONTH,
        "network and egress": lambda: (
            count * hours * own_network(x) if place.own else (terms.sent + work.checkpoint_bytes / GB) * x["cloud.egress"]
        ),
        "power and cooling": lambda: count * hours * own_power(x) if place.own else 0.0,
        "staff": lambda: x["people"] * x["staff.salary"] * paid / HOURS_A_YEAR * count / work.devices,
        "failures and lost work": lost,
        "idle time": idle,
    }
    unknown: list[str] = []

    def known(formula: Callable[[], Amount]) -> Amount:
        try:
            return formula()
        except UnknownPriceError as missing:
            unknown.append(str(missing.args[0]))
            return None

    def energy() -> Amount:
        return count * paid * x["power"] / x["per_server"] * x["own.pue" if place.own else "cloud.pue"]

    lines = {name: known(formulas[name]) for name in LINES}
    return Bill(lines, tuple(dict.fromkeys(unknown)), known(energy), known(lambda: energy() * x["grid.carbon"]))


def mixed(work: PricedRun, terms: Terms, x: Known, hours: Amount, paid: Amount, minibatches: Amount) -> Bill:
    """The first stages on own hardware, the others on demand, and what the boundary between them sends out of the cloud: the gradients,
    half of its traffic. The time is that of the plan."""
    own = own_stages(work, terms)
    here = bill(OWN, work, terms, x, hours, paid, own * work.replicas)
    there = bill(ON_DEMAND, work, terms, x, hours, paid, work.devices - own * work.replicas)
    lines = {name: _sum(here.lines[name], there.lines[name]) for name in LINES}
    lines["storage"] = there.lines["storage"]  # one copy of the checkpoints, in the cloud
    traffic = None if "cloud.egress" not in x else work.sent_bytes[own - 1] / 2 * minibatches / GB * x["cloud.egress"]
    lines["network and egress"] = _sum(lines["network and egress"], traffic)
    unknown = tuple(name for name in dict.fromkeys((*here.unknown, *there.unknown)) if name != "own.storage")
    return Bill(lines, unknown, _sum(here.energy, there.energy), _sum(here.carbon, there.carbon))


def own_stages(work: PricedRun, terms: Terms) -> int:
    """Of the mix.

    Raises:
        ConfigError: a number that leaves one side without a stage.
    """
    own = work.stages // 2 if terms.own_stages is None else terms.own_stages
    if work.stages == 1:
        raise ConfigError(f"own stages is {own}, but the plan has one stage, which cannot be in two places; leave it out")
    if not 1 <= own < work.stages:
        raise ConfigError(
            f"own stages is {own}, must be 1 to {work.stages - 1} of the plan's {work.stages} stages, so that some are in the cloud"
        )
    return own


def break_even(x: Known, other: RunPlace) -> Amount:
    """The share of its time in which own hardware must be used to cost as much as ``other``: ``C / (p - e)``, with C what it costs per
    hour of its life, e its power per hour and p the other's price. Above 1, or not above 0: it never does."""
    return (own_accelerator(x) + own_host(x) + own_network(x)) / (other.hour(x) - own_power(x))


def _sum(one: Amount, other: Amount) -> Amount:
    return None if one is None or other is None else one + other
