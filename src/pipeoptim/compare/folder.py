"""The folder of a comparison and its files. The same command continues it; another one never overwrites it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeoptim.compare.settings import ComparisonSettings, check_continues
from pipeoptim.errors import ConfigError
from pipeoptim.files import read_object


@dataclass(frozen=True)
class ComparisonFolder:
    """Paths of the comparison in ``path``."""

    path: Path

    @property
    def about(self) -> Path:
        """Settings, command, versions and hardware."""
        return self.path / "compare.json"

    @property
    def summary(self) -> Path:
        """One object per method and seed."""
        return self.path / "summary.json"

    @property
    def table(self) -> Path:
        """The same as CSV."""
        return self.path / "summary.csv"

    @property
    def report(self) -> Path:
        """The page to open."""
        return self.path / "report.html"

    @property
    def logs(self) -> Path:
        """What the worker processes print."""
        return self.path / "logs"

    def run(self, name: str) -> Path:
        """Folder of one run."""
        return self.path / "runs" / name

    def begin(self, settings: ComparisonSettings, command: str, machine: dict[str, Any]) -> None:
        """Make the folder, or see that it holds this comparison.

        Raises:
            ConfigError: it holds another one, or something else, or cannot be made.
        """
        if self.about.exists():
            check_continues(self.read_settings(), settings, str(self.path))
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise ConfigError(f"{self.path} exists and holds no comparison; choose another folder with --out")
        about = {"settings": settings.to_json(), "command": command, "machine": machine}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be made ({error.strerror}); choose another folder with --out") from error
        write_text(self.about, json.dumps(about, indent=2, allow_nan=False) + "\n")

    def read_about(self) -> dict[str, Any]:
        """What :meth:`begin` wrote.

        Raises:
            ConfigError: there is no comparison here, or it is damaged.
        """
        try:
            data = read_object(self.about)
            ComparisonSettings.from_json(data["settings"])
        except OSError as error:
            raise ConfigError(f"no comparison in {self.path} (no {self.about.name}); check the path") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"{self.about} is damaged ({error}); start again in another folder") from error
        return data

    def read_settings(self) -> ComparisonSettings:
        """The settings of the comparison that is here."""
        return ComparisonSettings.from_json(self.read_about()["settings"])


def write_text(path: Path, text: str) -> None:
    """Write to a temporary file and rename it, so that no reader sees half of it."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
