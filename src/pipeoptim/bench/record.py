"""What a benchmark writes: raw samples with the hardware and versions they were taken on, as one JSON file."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from pipeoptim.version import __version__


@dataclass
class Row:
    """One contender of a benchmark.

    Attributes:
        name: what was measured.
        samples: one figure per repeat.
        settings: what tells it from the others.
    """

    name: str
    samples: list[float]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """The middle of the samples."""
        return median(self.samples)


@dataclass
class Record:
    """A finished benchmark.

    Attributes:
        benchmark: its name, as on the command line.
        unit: of the samples.
        settings: what all rows share.
        rows: the contenders.
        machine: hardware and versions.
    """

    benchmark: str
    unit: str
    settings: dict[str, Any]
    rows: list[Row]
    machine: dict[str, Any] = field(default_factory=lambda: machine())

    def row(self, name: str) -> Row:
        """The row of that name."""
        return next(row for row in self.rows if row.name == name)

    def write(self, path: Path) -> Path:
        """Write it as JSON, beside and renamed, so that no reader sees half of it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(asdict(self), indent=1) + "\n")
        part.replace(path)
        return path

    @staticmethod
    def read(path: Path) -> Record:
        """Read what :meth:`write` wrote."""
        data = json.loads(path.read_text())
        data["rows"] = [Row(**row) for row in data["rows"]]
        return Record(**data)


def machine() -> dict[str, Any]:
    """The hardware and versions of this process."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())],
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pipeoptim": __version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
