"""MLflow. ``MLFLOW_TRACKING_URI`` says where to; without it MLflow's own default, beside the folder where the command runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeoptim.telemetry.loggers.run_logger import LoggedRun


class MlflowLog:
    """One MLflow run per run, which a resumed session continues: its number is kept in ``runs/<name>/mlflow_run_id``.

    Args:
        experiment: that it belongs to.
    """

    def __init__(self, run: LoggedRun, experiment: str = "pipeoptim") -> None:
        import mlflow

        kept = run.folder / "mlflow_run_id"
        self._mlflow: Any = mlflow
        mlflow.set_experiment(experiment)
        if run.start and kept.exists():
            mlflow.start_run(run_id=kept.read_text().strip())
        else:
            kept.write_text(mlflow.start_run(run_name=run.name).info.run_id)
            mlflow.log_params({name: str(value)[:500] for name, value in run.config.items()})

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Values at ``step``; sent in the background."""
        self._mlflow.log_metrics(dict(values), step=step, synchronous=False)

    def close(self) -> None:
        """Wait until all is sent."""
        self._mlflow.flush_async_logging()
        self._mlflow.end_run()


LOGGER, PACKAGE = MlflowLog, "mlflow"
