"""Prediction errors as rows of ``metrics.jsonl``, as TensorBoard scalars and as one figure per stage.

What is measured, and the warning, are the engine's (:mod:`pipeoptim.engine.stage.prediction_monitor`);
here it becomes something to look at.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from pipeoptim.engine import PredictionError

FIGURES = ("relative_error", "cosine", "best_scale", "scale")
WINDOW = 20  # measurements that a stage's figure is the mean of


def rows(errors: Iterable[PredictionError]) -> list[dict[str, Any]]:
    """One plain dictionary per measurement, six digits; figures that mean nothing are None.

    >>> (row,) = rows([PredictionError(1, 0, version=7, steps=2, relative_error=0.12345678, cosine=None, best_scale=1.0)])
    >>> row["stage"], row["relative_error"], row["cosine"]
    (1, 0.123457, None)
    """
    return [{name: _short(value) for name, value in asdict(error).items()} for error in errors]


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def scalars(measured: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Names and values for TensorBoard.

    >>> scalars([{"stage": 1, "group": 0, "relative_error": 0.5, "cosine": None, "best_scale": 1.0, "scale": 1.0}])
    {'prediction/relative_error/stage1_group0': 0.5, 'prediction/best_scale/stage1_group0': 1.0, 'prediction/scale/stage1_group0': 1.0}
    """
    named = {}
    for row in measured:
        for name in FIGURES:
            if row[name] is not None:
                named[f"prediction/{name}/stage{row['stage']}_group{row['group']}"] = row[name]
    return named


class StageErrors:
    """The means of each stage over its last measurements, for the summary of a run."""

    def __init__(self) -> None:
        self._last: dict[int, deque[dict[str, Any]]] = {}
        self._version: dict[tuple[int, int], int] = {}

    def note(self, measured: Iterable[dict[str, Any]]) -> None:
        """Add rows; a measurement that is repeated counts once."""
        for row in measured:
            key = row["stage"], row["group"]
            if row["relative_error"] is not None and self._version.get(key) != row["version"]:
                self._version[key] = row["version"]
                self._last.setdefault(row["stage"], deque(maxlen=WINDOW)).append(row)

    def mean(self, stage: int, name: str = "relative_error") -> float | None:
        """Of the figure called ``name``; None where nothing was measured."""
        last = [row[name] for row in self._last.get(stage, ()) if row[name] is not None]
        return sum(last) / len(last) if last else None

    def best_scale(self, stage: int) -> float | None:
        """The factor on predictions without any that would have fitted best; None where nothing was measured."""
        last = [row["scale"] * row["best_scale"] for row in self._last.get(stage, ()) if row["best_scale"] is not None]
        return sum(last) / len(last) if last else None


class Changes:
    """Sentences about predictions that became worse than none, or better again."""

    def __init__(self) -> None:
        self._worse: set[tuple[int, int]] = set()

    def note(self, measured: Iterable[dict[str, Any]]) -> list[str]:
        """What changed with these rows.

        >>> row = {"stage": 1, "group": 0, "version": 7, "worse": True}
        >>> changes = Changes()
        >>> changes.note([row])
        ['stage 1, parameter group 0: the weight prediction is worse than none (version 7)']
        >>> changes.note([row])
        []
        """
        told = []
        for row in measured:
            key = row["stage"], row["group"]
            if row["worse"] != (key in self._worse):
                self._worse ^= {key}
                what = "worse than none" if row["worse"] else "better than none again"
                where = f"stage {key[0]}, parameter group {key[1]}"
                told.append(f"{where}: the weight prediction is {what} (version {row['version']})")
        return told
