"""Ends a run whose validations do not get better any more."""

from __future__ import annotations

from collections.abc import Mapping

from pipeoptim.errors import ConfigError, counted
from pipeoptim.train.callbacks.callback import Callback, RunView
from pipeoptim.train.monitored import MonitoredFigure


class EarlyStopping(Callback):
    """Stops after ``patience`` validations in a row without a better one.

    Args:
        patience: how many.
        monitor, mode, min_delta: of which figure, see :class:`~pipeoptim.train.monitored.MonitoredFigure`.
    """

    def __init__(self, patience: int = 5, monitor: str = "val_loss", mode: str = "min", min_delta: float = 0.0) -> None:
        if type(patience) is not int or patience < 1:
            raise ConfigError(f"patience is {patience!r}, must be a number of validations of at least 1")
        self._patience, self._figure, self._worse = patience, MonitoredFigure(monitor, mode, min_delta), 0

    def on_start(self, run: RunView) -> None:
        """Count the validations of earlier sessions."""
        for row in run.rows() if run.start else []:
            if self._figure.name in row:
                self._count(row)

    def on_eval(self, run: RunView, step: int, figures: Mapping[str, float]) -> None:
        """Stop if it is time."""
        self._count(figures)
        if self._worse >= self._patience:
            best = "none was finite" if self._figure.best is None else f"best {self._figure.best:.4g}"
            name = self._figure.name
            run.stop(f"early stopping at step {step}: {name} no better for {counted(self._worse, 'validation')} ({best})")

    def _count(self, figures: Mapping[str, float]) -> None:
        self._worse = 0 if self._figure.improves(figures) else self._worse + 1


CALLBACK = EarlyStopping
