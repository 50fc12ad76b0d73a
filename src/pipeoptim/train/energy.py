"""How much energy this machine has taken: counters of its processors and GPUs, codecarbon, or a fixed power."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Protocol

import torch

from pipeoptim.errors import ConfigError

JOULES_PER_KWH = 3.6e6
COUNTERS = "/sys/class/powercap"


class EnergySource(Protocol):
    """Counts from when it is made."""

    def kwh(self) -> float | None:
        """So far; None where it cannot be known. To be asked every few seconds."""


class FixedPower:
    """So many watts, all the time."""

    def __init__(self, watts: float) -> None:
        self._watts, self._began = watts, time.monotonic()

    def kwh(self) -> float | None:
        """Power times time."""
        return self._watts * (time.monotonic() - self._began) / JOULES_PER_KWH


class PowerCounters:
    """The processors' own counters (RAPL), which begin anew at some value, and the power of all GPUs, between two looks the same.

    All that runs on the machine counts. Not the memory, fans and power supplies.
    """

    def __init__(self, counters: Path = Path(COUNTERS)) -> None:
        self._packages = [(path, int((path / "max_energy_range_uj").read_text())) for path in _packages(counters)]
        self._gpus = _readable_gpus()
        self._joules, self._last, self._values = 0.0, time.monotonic(), self._read()

    def kwh(self) -> float | None:
        """Summed up until now."""
        if not self._packages and not self._gpus:
            return None
        now, values = time.monotonic(), self._read()
        for (_, most), before, after in zip(self._packages, self._values, values, strict=True):
            self._joules += ((after - before) % (most + 1)) / 1e6
        self._joules += (now - self._last) * sum(torch.cuda.power_draw(n) for n in self._gpus) / 1e3
        self._last, self._values = now, values
        return self._joules / JOULES_PER_KWH

    def _read(self) -> list[int]:
        return [int((path / "energy_uj").read_text()) for path, _ in self._packages]


def _packages(counters: Path) -> list[Path]:
    """Folders of whole processors, whose parts have two numbers in their names; none where they may not be read."""
    found = []
    for path in sorted(counters.glob("*-rapl:*")):
        try:
            if path.name.count(":") == 1 and (path / "name").read_text().startswith("package"):
                (path / "energy_uj").read_text()
                found.append(path)
        except OSError:  # for root only, on most machines
            continue
    return found


def _readable_gpus() -> list[int]:
    """Numbers of those whose power can be read, which takes nvidia-ml-py."""
    try:
        return [n for n in range(torch.cuda.device_count()) if torch.cuda.power_draw(n) >= 0]
    except (ImportError, RuntimeError):
        return []


class CodeCarbon:
    """codecarbon's measurement of this machine, an extra; everything that it knows of, memory by a formula."""

    def __init__(self) -> None:
        try:
            from codecarbon import OfflineEmissionsTracker
            from codecarbon.output import BaseOutput
        except ImportError as error:
            raise ConfigError("codecarbon is not installed; pip install 'pipeoptim[energy]', or leave energy out") from error

        class Newest(BaseOutput):  # type: ignore[misc]
            kwh = 0.0

            def out(self, total: Any, delta: Any) -> None:
                self.kwh = total.energy_consumed

            live_out = out

        self._newest = Newest()
        self._tracker = OfflineEmissionsTracker(
            country_iso_code="USA",  # of carbon, which is not asked for
            save_to_file=False,
            output_handlers=[self._newest],
            log_level="critical",
            allow_multiple_runs=True,
        )
        self._tracker.start()

    def kwh(self) -> float | None:
        """As of now."""
        self._tracker.flush()
        return float(self._newest.kwh)
