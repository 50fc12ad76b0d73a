"""MLflow. ``MLFLOW_TRACKING_URI`` says where to; without it MLflow's own default, beside the folder where the command runs."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping
from typing import Any

from pipeoptim.telemetry.loggers.run_logger import LoggedRun


class MlflowLog:
    """One MLflow run per run, which a resumed session continues: its number is kept in ``runs/<name>/mlflow_run_id``.

    Args:
        experiment: that it belongs to.
    """

    def __init__(self, run: LoggedRun, experiment: str = "pipeoptim") -> None:
        # MLflow sends by ten threads, of which two that make the folder of a metric at once lose a row of its file store; one also keeps
        # the order.
        os.environ.setdefault("MLFLOW_ASYNC_LOGGING_THREADPOOL_SIZE", "1")
        import mlflow

        kept = run.folder / "mlflow_run_id"
        self._mlflow: Any = mlflow
        self._on_their_way: deque[Any] = deque()
        mlflow.set_experiment(experiment)
        if run.start and kept.exists():
            mlflow.start_run(run_id=kept.read_text().strip())
        else:
            kept.write_text(mlflow.start_run(run_name=run.name).info.run_id)
            mlflow.log_params({name: str(value)[:500] for name, value in run.config.items()})

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Values at ``step``; sent in the background. A row that could not be sent raises MLflow's error, later or at ``close``."""
        self._on_their_way.append(self._mlflow.log_metrics(dict(values), step=step, synchronous=False))
        if len(self._on_their_way) > MOST_ON_THEIR_WAY:
            self._on_their_way.popleft().wait()

    def close(self) -> None:
        """Wait until all is sent, and raise what went wrong."""
        try:
            while self._on_their_way:
                self._on_their_way.popleft().wait()
        finally:
            self._mlflow.flush_async_logging()
            self._mlflow.end_run()


MOST_ON_THEIR_WAY = 1000
"""Rows that may wait for the server before training waits for it."""

LOGGER, PACKAGE = MlflowLog, "mlflow"
