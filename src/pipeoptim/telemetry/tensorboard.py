"""The figures of a run on TensorBoard, where it is installed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeoptim.errors import ConfigError


def check_installed() -> None:
    """Raises ConfigError without TensorBoard."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"tensorboard is not installed ({error}); pip install 'pipeoptim[tensorboard]', or leave --tensorboard out"
        ) from error


class TensorBoardLog:
    """Scalars of a run in ``folder``; look at them with ``tensorboard --logdir runs``.

    Args:
        start: the step that the session begins after; what an earlier session wrote for later steps is hidden.
    """

    def __init__(self, folder: Path, start: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=start + 1 if start else None)  # type: ignore[no-untyped-call]

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Values at ``step``, mini-batches done."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def __enter__(self) -> TensorBoardLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._writer.close()
