"""Trackio: a local data base (``TRACKIO_DIR``), which ``trackio show`` displays; or a Space of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeoptim.telemetry.loggers.run_logger import LoggedRun


class TrackioLog:
    """One Trackio run per run; a resumed session continues it.

    Args:
        options: of ``trackio.init``, such as ``project="mine"`` or ``space_id="me/space"``.
    """

    def __init__(self, run: LoggedRun, **options: Any) -> None:
        import trackio

        defaults = {"project": "pipeoptim", "name": run.name, "resume": "allow" if run.start else "never", "embed": False}
        self._run: Any = trackio.init(config=dict(run.config), **{**defaults, **options})

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Values at ``step``."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Wait until all is kept."""
        self._run.finish()


LOGGER, PACKAGE = TrackioLog, "trackio"
