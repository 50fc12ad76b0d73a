"""Weights & Biases. Its own environment variables say how: ``WANDB_MODE=offline`` writes files in ``runs/<name>/wandb`` only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import uuid4

from pipeoptim.telemetry.loggers.run_logger import LoggedRun


class WandbLog:
    """One W&B run per run, which a resumed session continues: its number is kept in ``runs/<name>/wandb_run_id``.

    Args:
        options: of ``wandb.init``, such as ``project="mine"``.
    """

    def __init__(self, run: LoggedRun, **options: Any) -> None:
        import wandb

        kept = run.folder / "wandb_run_id"
        if not (run.start and kept.exists()):
            kept.write_text(uuid4().hex)
        defaults = {"project": "pipeoptim", "name": run.name, "id": kept.read_text().strip(), "resume": "allow"}
        self._run: Any = wandb.init(dir=str(run.folder), config=dict(run.config), **{**defaults, **options})
        # Not W&B's own counter, which takes no value of an earlier step: those of predictions come late.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Values at ``step``."""
        self._run.log({**values, "step": step})

    def close(self) -> None:
        """Wait until all is sent, or written."""
        self._run.finish()


LOGGER, PACKAGE = WandbLog, "wandb"
