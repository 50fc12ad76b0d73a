"""Reads what one run left in its folder: how it ended, its curves, and its figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeoptim.compare.plan import PlannedRun
from pipeoptim.compare.statistics import Curve
from pipeoptim.compare.worker import OUTCOME
from pipeoptim.config import TrainConfig
from pipeoptim.errors import ConfigError
from pipeoptim.files import read_object, reading
from pipeoptim.methods import copies, get_method, refresh_every
from pipeoptim.telemetry.metrics import Row, read_rows, tail_mean
from pipeoptim.train.checks import program

#: A run whose final loss is above this many times that of its first step has diverged, although its loss is finite.
LOST = 2.0


@dataclass(frozen=True)
class Outcome:
    """One run of a comparison, after it ended.

    Args:
        method, seed, optimizer: which run it is; ``optimizer`` is its short name with its options.
        status: ``finished``, ``diverged``, ``refused`` or ``failed``. reason: why, where it is not ``finished``.
        steps: mini-batches that it did.
        train, validation: step and loss.
        metrics: of the last validation.
        seconds_per_step: mean time of a mini-batch, validations not counted. None where there are no figures.
        samples_per_second: the same as a rate.
        weight_bytes, weight_copies: the most that one stage held, measured, and what the method promises.
        versions, machine, data: what computed, on what.
    """

    method: str
    seed: int
    optimizer: str
    status: str
    reason: str = ""
    steps: int = 0
    train: Curve = field(default_factory=Curve)
    validation: Curve = field(default_factory=Curve)
    metrics: dict[str, float] = field(default_factory=dict)
    seconds_per_step: float | None = None
    samples_per_second: float | None = None
    weight_bytes: int | None = None
    weight_copies: int = 1
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    data: str = ""

    @property
    def finished(self) -> bool:
        """Whether it trained to its end on finite losses."""
        return self.status == "finished"

    @property
    def train_loss(self) -> float | None:
        """Mean over the last 5 % of the steps; None if it did not finish."""
        return tail_mean(self.train.values) if self.finished else None

    @property
    def val_loss(self) -> float | None:
        """Of the last validation; None if it did not finish."""
        return self.validation.values[-1] if self.finished and self.validation.values else None


def is_done(folder: Path) -> bool:
    """Whether the run in ``folder`` has ended with a result, so that it is not repeated; a failure is no result."""
    try:
        status = read_object(folder / OUTCOME).get("status")
    except (OSError, ConfigError):
        return False
    return status in ("finished", "diverged", "refused")


def read_outcome(run: PlannedRun, folder: Path) -> Outcome:
    """How ``run`` in ``folder`` ended.

    Raises:
        OSError: it has not ended.
        ConfigError: its files are damaged.
    """
    with reading(folder):
        ended = read_object(folder / OUTCOME)
        return _read(run.config, folder, ended["status"], ended.get("reason", ""))


def read_run(config: TrainConfig, folder: Path) -> Outcome:
    """The run of ``pipeoptim train`` in ``folder``, as far as it has come.

    Raises:
        ConfigError: it has no figures, or its files are damaged.
    """
    with reading(folder):
        run = _read(config, folder, "finished", "")
    if not run.train.steps:
        raise ConfigError(f"run {folder} has no figures yet (no rows in {folder / 'metrics.jsonl'}); train it first")
    return run


def _read(config: TrainConfig, folder: Path, status: str, reason: str) -> Outcome:
    rows = read_rows(folder / "metrics.jsonl")
    train = [row for row in rows if "loss" in row]
    validation = [row for row in rows if "val_loss" in row]
    last = validation[-1] if validation else {}
    result = _result(folder)
    rate = result.get("samples_per_second") or _rate(train)
    stages = result.get("stages", [])
    if status == "finished" and (lost := _lost(rows, train, last, config.steps)):
        status, reason = "diverged", lost
    method, made, refresh = get_method(config.method), program(config), refresh_every(config.prediction, config.refresh or None)
    return Outcome(
        method=config.method,
        seed=config.seed,
        optimizer=describe_optimizer(config),
        status=status,
        reason=reason,
        steps=max((row.get("step", 0) for row in rows), default=0),
        train=Curve([row["step"] for row in train], [row["loss"] for row in train]),
        validation=Curve([row["step"] for row in validation], [row["val_loss"] for row in validation]),
        metrics={key: value for key, value in last.items() if key.startswith("val_") and key != "val_loss"},
        seconds_per_step=config.batch_size / rate if rate else None,
        samples_per_second=rate,
        weight_bytes=max((stage["weight_bytes"] for stage in stages), default=None),
        weight_copies=max(
            copies(method, config.stages, config.microbatches, k, program=made, refresh=refresh) for k in range(config.stages)
        ),
        versions=result.get("versions", {}),
        machine=result.get("machine", {}),
        data=result.get("data", ""),
    )


def describe_optimizer(config: TrainConfig) -> str:
    """Its name and its options but for the learning rate, which stands apart, as in ``adamw(weight_decay=0.01)``."""
    component = config.optimizer
    options = ", ".join(f"{key}={_short(value)}" for key, value in component.options.items() if key != "lr")
    return f"{component.target}({options})" if options else component.target


def _short(value: Any) -> str:
    if isinstance(value, dict) and "by_stage" in value:
        return f"by stage {value['by_stage'][0]} .. {value['by_stage'][-1]}"
    return str(value)


def _lost(rows: Sequence[Row], train: Sequence[Row], last: Row, steps: int) -> str:
    """Why a run that came to its end has diverged all the same; nothing if it has not."""
    at_end = [row for row in rows if row.get("step") == steps]
    if at_end and not any("val_loss" in row for row in at_end):
        return "the last validation loss is not a finite number"
    if train and last and last["val_loss"] > LOST * train[0]["loss"]:
        return f"it ended at validation loss {last['val_loss']:.4g}, having begun at {train[0]['loss']:.4g}"
    return ""


def _result(folder: Path) -> dict[str, Any]:
    path = folder / "result.json"
    return read_object(path) if path.exists() else {}


def _rate(train: Sequence[dict[str, Any]]) -> float | None:
    """Of a run without a result: the mean of the rates in its rows, each weighed with its time."""
    rates = [row["samples_per_second"] for row in train if row.get("samples_per_second")]
    return len(rates) / sum(1 / rate for rate in rates) if rates else None
