"""The result file of a benchmark: raw samples with the hardware and versions they were taken on, as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from pipeoptim.errors import ConfigError
from pipeoptim.files import read_object
from pipeoptim.train.machine import machine


@dataclass
class ResultRow:
    """One contender of a benchmark.

    Attributes:
        name: what was measured.
        samples: one figure per repeat.
        settings: what distinguishes it from the others.
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
    rows: list[ResultRow]
    machine: dict[str, Any] = field(default_factory=machine)

    @classmethod
    def continued(cls, path: Path, unit: str, settings: dict[str, Any]) -> Record:
        """What ``path`` holds, where that was measured on this machine with these versions; else one without rows, named after the file."""
        if path.exists() and (found := cls.read(path)).machine == machine():
            return found
        return cls(path.stem, unit, settings, [])

    def row(self, name: str) -> ResultRow:
        """The row of that name."""
        return next(row for row in self.rows if row.name == name)

    def row_or_new(self, name: str) -> ResultRow:
        """The row of that name, which is added without samples where there is none."""
        if all(row.name != name for row in self.rows):
            self.rows.append(ResultRow(name, []))
        return self.row(name)

    def write(self, path: Path) -> Path:
        """Write it as JSON, by renaming a temporary file, so that no reader sees half of it.

        Raises:
            ConfigError: ``path`` names no file.
        """
        if not path.name or path.is_dir():
            raise ConfigError(f"the result would go to {str(path)!r}, which is a folder; name a file in it")
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(asdict(self), indent=1) + "\n")
        part.replace(path)
        return path

    @staticmethod
    def read(path: Path) -> Record:
        """Read what :meth:`write` wrote."""
        try:
            data = read_object(path)
            return Record(**{**data, "rows": [ResultRow(**row) for row in data["rows"]]})
        except (OSError, KeyError, TypeError, ConfigError) as error:
            raise ConfigError(f"{path} is not a result file of pipeoptim bench: {error}") from error


def merged(old: Record, new: Record) -> Record:
    """The rows of ``new``, and before them those of ``old`` that ``new`` has no row of the same name for.

    Raises:
        ConfigError: they were taken on different machines or versions, or by different benchmarks.
    """
    if (old.machine, old.benchmark) != (new.machine, new.benchmark):
        raise ConfigError("the figures in that file are of another machine, version or benchmark; write to another file")
    names = {row.name for row in new.rows}
    return Record(
        new.benchmark, new.unit, new.settings, [row for row in old.rows if row.name not in names] + new.rows, new.machine
    )
