"""What a run asks of a tool that logs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class LoggedRun:
    """What a logger is told of the run.

    Attributes:
        name: of the run.
        folder: its directory; a logger that writes files makes a folder of its own in it.
        start: mini-batches done before this session; above 0 in a resumed run.
        config: its configuration, plain data.
    """

    name: str
    folder: Path
    start: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)


class RunLogger(Protocol):
    """Called in the process of the last stage, which has the losses. Made with a :class:`LoggedRun` and the options that a user gives."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """``values`` as of ``step`` mini-batches. Those of an earlier step may come later, and in a resumed run once more."""
        ...

    def close(self) -> None:
        """The session has ended; all that was logged is to be kept."""
        ...
