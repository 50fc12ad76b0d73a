"""Says what a run has cost so far, in money and energy, and at its end how that compares with what was estimated."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeoptim.errors import ConfigError
from pipeoptim.files import read_object, reading, write_durably
from pipeoptim.train.callbacks.callback import Callback, RunView
from pipeoptim.train.energy import CodeCarbon, EnergySource, FixedPower, PowerCounters
from pipeoptim.train.layout import layout_of

if TYPE_CHECKING:
    from pipeoptim.train.result import RunResult

SOURCES: dict[str, Callable[[], EnergySource]] = {"counters": PowerCounters, "codecarbon": CodeCarbon}

WRITTEN_EVERY = 10.0
"""Seconds that the account of a killed run loses at most."""


class CostMeter(Callback):
    """Keeps the account of a run in ``runs/<name>/cost.json``, over restarts and resumed sessions; says it at every validation.

    The time between two sessions does not count. Work that is done again after a failure does.

    Args:
        usd_per_hour: of one device, that is, of one process; None for unknown.
        watts: that one device takes, where ``energy`` is not measured.
        energy: ``"counters"`` of this machine's processors and GPUs, or ``"codecarbon"``, an extra; both measure one machine.
        estimate: a file of ``pipeoptim cost --out``, to compare with at the end.
        place: whose estimate in it.

    Example:
        >>> meter = CostMeter(usd_per_hour=3.99, watts=700)
    """

    def __init__(
        self,
        usd_per_hour: float | None = None,
        watts: float | None = None,
        energy: str = "counters",
        estimate: str = "",
        place: str = "on demand",
    ) -> None:
        for what, value in (("usd_per_hour", usd_per_hour), ("watts", watts)):
            if value is not None and (type(value) not in (int, float) or not 0 <= value <= 1e9):
                raise ConfigError(f"{what} is {value!r}, must be a number from 0 to 1e9, of one device")
        if energy not in SOURCES:
            raise ConfigError(f"energy is {energy!r}, must be one of {', '.join(SOURCES)}; or give watts")
        if watts is not None and energy != "counters":
            raise ConfigError(f"energy is {energy!r} and watts is {watts:g}; leave one of them out")
        self._price, self._watts, self._energy = usd_per_hour, watts, energy
        self._expected = _expected(Path(estimate), place) if estimate else None

    def on_start(self, run: RunView) -> None:
        """Go on with the account of earlier sessions."""
        if not run.reports:
            return
        config = run.config
        self._devices = layout_of(config).processes if config.engine == "processes" else 1
        self._source = SOURCES[self._energy]() if self._watts is None else FixedPower(self._watts * self._devices)
        self._path = run.folder / "cost.json"
        self._earlier: dict[str, Any] = {"hours": 0.0, "kWh": 0.0, "sessions": 0}
        if self._path.exists():
            with reading(run.folder):
                kept = read_object(self._path)
                self._earlier = {name: kept[name] for name in self._earlier}
        self._began = self._written = time.monotonic()

    def on_step(self, run: RunView, step: int, loss: float) -> None:
        """Keep the account now and then."""
        if time.monotonic() - self._written >= WRITTEN_EVERY:
            self._keep()

    def on_eval(self, run: RunView, step: int, figures: Mapping[str, float]) -> None:
        """Say it."""
        run.say(f"step {step}: {_words(self._keep())} so far")

    def on_stop(self, run: RunView, result: RunResult) -> None:
        """Say it, beside the estimate where the run has finished."""
        account = self._keep()
        run.say(f"cost of the run: {_words(account)}")
        if self._expected is not None and result.status == "finished":
            account["estimated"] = self._expected
            write_durably(self._path, json.dumps(account, indent=1) + "\n")
            for sentence in _compared(account, self._expected):
                run.say(sentence)

    def _keep(self) -> dict[str, Any]:
        """Write the account, and return it."""
        self._written = time.monotonic()
        hours = self._earlier["hours"] + (self._written - self._began) / 3600
        kwh, earlier = self._source.kwh(), self._earlier["kWh"]
        account = {
            "hours": hours,
            "devices": self._devices,
            "device hours": hours * self._devices,
            "USD": None if self._price is None else hours * self._devices * self._price,
            "kWh": None if kwh is None or earlier is None else earlier + kwh,
            "sessions": self._earlier["sessions"] + 1,
        }
        write_durably(self._path, json.dumps(account, indent=1) + "\n")
        return account


def _expected(path: Path, place: str) -> dict[str, Any]:
    """Percentiles of what ``place`` costs, by the names of an account."""
    try:
        data = read_object(path)
    except OSError as error:
        raise ConfigError(
            f"the estimate {path} cannot be read ({error.strerror}); make it with pipeoptim cost --out {path}"
        ) from error
    places = data.get("places")
    if not isinstance(places, dict):
        raise ConfigError(f"{path} is no estimate; make it with pipeoptim cost --out {path}")
    if place not in places:
        raise ConfigError(f"place is {place!r}, must be one of those in {path}: {', '.join(map(repr, places))}")
    with reading(path):
        found = places[place]
        return {"USD": found["total USD"], "kWh": found["kWh"], "hours": found["hours"]}


def _words(account: Mapping[str, Any]) -> str:
    """An account in a few words.

    >>> _words({"USD": 1.5, "kWh": None, "device hours": 0.25, "devices": 2})
    '1.500 USD, energy unknown, 0.250 device hours (2 devices)'
    """
    money = "price unknown" if account["USD"] is None else f"{account['USD']:,.3f} USD"
    energy = "energy unknown" if account["kWh"] is None else f"{account['kWh']:.4g} kWh"
    return f"{money}, {energy}, {account['device hours']:.3f} device hours ({account['devices']} device{'s' * (account['devices'] != 1)})"


def _compared(account: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Estimate against actual, of what both know."""
    told = []
    for name in ("USD", "kWh", "hours"):
        actual, percentiles = account[name], expected[name]
        if actual is None or not percentiles or None in percentiles or not percentiles[1]:
            continue
        low, middle, high = percentiles
        told.append(f"estimated {middle:.4g} {name} ({low:.4g} to {high:.4g}), actual {actual:.4g}: {actual / middle - 1:+.1%}")
    return told


CALLBACK = CostMeter
