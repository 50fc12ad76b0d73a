"""TensorBoard: event files in ``runs/<name>/tensorboard``; look at them with ``tensorboard --logdir runs``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeoptim.telemetry.loggers.run_logger import LoggedRun


class TensorBoardLog:
    """What an earlier session wrote for later steps is hidden."""

    def __init__(self, run: LoggedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        make: Any = SummaryWriter
        self._writer = make(str(run.folder / "tensorboard"), purge_step=run.start + 1 if run.start else None)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Values at ``step``."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


LOGGER, PACKAGE = TensorBoardLog, "tensorboard"
