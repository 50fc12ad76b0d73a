"""A comparison as a whole: an entry per run, a summary per method, and the reservations that must accompany them."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeoptim.compare.outcome import Outcome
from pipeoptim.compare.settings import ComparisonSettings
from pipeoptim.compare.statistics import Spread, default_target, share_of_gap, steps_to
from pipeoptim.methods import get_method
from pipeoptim.train.change_method import with_method

#: What the gap is measured between: the first of each that takes part.
SYNCHRONOUS, UNCORRECTED = ("1f1b", "gpipe"), ("naive", "pipedream")


@dataclass(frozen=True)
class Comparison:
    """All outcomes of ``settings``, in the order of its methods and seeds; ``left_out`` names methods with the reason."""

    settings: ComparisonSettings
    outcomes: Sequence[Outcome]
    left_out: Mapping[str, str]

    def of(self, method: str) -> list[Outcome]:
        """The outcomes of one method."""
        return [outcome for outcome in self.outcomes if outcome.method == method]

    @property
    def methods(self) -> list[str]:
        """Those that took part."""
        return [name for name in self.settings.methods if self.of(name)]

    @property
    def synchronous(self) -> str | None:
        """The method that the others are compared with."""
        return next((name for name in SYNCHRONOUS if name in self.methods), None)

    @property
    def uncorrected(self) -> str | None:
        """The method that shows what asynchrony costs without any correction."""
        return next((name for name in UNCORRECTED if name in self.methods), None)

    @property
    def target(self) -> float | None:
        """The validation loss whose first crossing is timed."""
        if self.settings.target is not None:
            return self.settings.target
        return default_target(o.val_loss for o in self.of(self.synchronous or ""))

    def _val(self, method: str | None) -> Spread | None:
        """Over all seeds; None where one has no loss, since a mean over the others would be biased."""
        outcomes = self.of(method or "")
        return Spread.of(o.val_loss for o in outcomes) if all(o.finished for o in outcomes) else None

    def share(self, loss: float | None) -> float | None:
        """Share of the gap between the uncorrected and the synchronous method that a validation loss closes."""
        return share_of_gap(loss, self._val(self.synchronous), self._val(self.uncorrected))

    def metric_names(self) -> list[str]:
        """Of all outcomes, without ``val_``."""
        return list(dict.fromkeys(key.removeprefix("val_") for o in self.outcomes for key in o.metrics))

    def entry(self, o: Outcome) -> dict[str, Any]:
        """The object of one run in ``summary.json``."""
        config, target = self.settings.config, self.target
        steps = steps_to(o.validation, target)
        return {
            "method": o.method,
            "seed": o.seed,
            "final_train_loss": o.train_loss,
            "final_val_loss": o.val_loss,
            "samples_per_second": o.samples_per_second,
            "max_weight_copies": o.weight_copies,
            "weight_bytes": o.weight_bytes,
            "status": o.status,
            "reason": o.reason or None,
            "diverged": o.status == "diverged",
            "optimizer": o.optimizer,
            "recipe": config.recipe,
            "stages": config.stages,
            "microbatches": config.microbatches,
            "slack": with_method(config, o.method).slack,
            "batch_size": config.batch_size,
            "steps": o.steps,
            "prediction": config.prediction if get_method(o.method).predicts else None,
            "engine": config.engine,
            "metrics": {key.removeprefix("val_"): value for key, value in o.metrics.items()},
            "target": target,
            "steps_to_target": steps,
            "seconds_to_target": None if steps is None or o.seconds_per_step is None else steps * o.seconds_per_step,
            "share_of_gap_closed": self.share(o.val_loss),
        }

    def entries(self) -> list[dict[str, Any]]:
        """One object per run; a method that was left out has one too, with the reason and no figures."""
        empty: dict[str, Any] = dict.fromkeys(self.entry(self.outcomes[0])) if self.outcomes else {}
        left_out = [
            {**empty, "method": name, "status": "left out", "reason": reason, "diverged": False, "metrics": {}}
            for name, reason in self.left_out.items()
        ]
        return [self.entry(o) for o in self.outcomes] + left_out

    def lines(self) -> list[MethodSummary]:
        """One line per method that took part."""
        return [self._line(name) for name in self.methods]

    def _line(self, name: str) -> MethodSummary:
        outcomes = self.of(name)
        entries = [self.entry(o) for o in outcomes]

        def spread(key: str) -> Spread | None:
            return Spread.of(entry[key] for entry in entries)

        val_loss = spread("final_val_loss")
        return MethodSummary(
            method=name,
            optimizer=outcomes[0].optimizer,
            runs=len(outcomes),
            diverged=sum(o.status == "diverged" for o in outcomes),
            train_loss=spread("final_train_loss"),
            val_loss=val_loss,
            metrics={
                m: Spread.of(o.metrics.get(f"val_{m}") if o.finished else None for o in outcomes) for m in self.metric_names()
            },
            steps_to_target=spread("steps_to_target"),
            seconds_to_target=spread("seconds_to_target"),
            samples_per_second=spread("samples_per_second"),
            weight_bytes=max((o.weight_bytes for o in outcomes if o.weight_bytes is not None), default=None),
            weight_copies=outcomes[0].weight_copies,
            share=None if val_loss is None or val_loss.count < len(outcomes) else self.share(val_loss.mean),
        )


@dataclass(frozen=True)
class MethodSummary:
    """One method over its seeds, as the tables show it."""

    method: str
    optimizer: str
    runs: int
    diverged: int
    train_loss: Spread | None
    val_loss: Spread | None
    metrics: Mapping[str, Spread | None]
    steps_to_target: Spread | None
    seconds_to_target: Spread | None
    samples_per_second: Spread | None
    weight_bytes: int | None
    weight_copies: int
    share: float | None


def to_csv(entries: Sequence[Mapping[str, Any]]) -> str:
    """The entries as CSV, one column per key, metrics in columns of their own."""
    rows = [
        {**{k: v for k, v in e.items() if k != "metrics"}, **{f"metric_{k}": v for k, v in e["metrics"].items()}}
        for e in entries
    ]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
