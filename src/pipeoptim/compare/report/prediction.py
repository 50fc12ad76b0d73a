"""How good a run's weight predictions were: one row per stage and parameter group, from its metrics.jsonl."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from pipeoptim.telemetry.metrics import read_rows
from pipeoptim.telemetry.prediction import WINDOW
from pipeoptim.train.rundir import RunDir


def predictions(path: Path) -> str:
    """The section; empty where nothing was measured."""
    measured: dict[tuple[int, int], dict[int, dict[str, Any]]] = defaultdict(dict)
    for row in read_rows(RunDir(path).metrics):
        for entry in row.get("prediction", ()):
            measured[entry["stage"], entry["group"]][entry["version"]] = entry
    if not measured:
        return ""
    body = "".join(_line(*key, list(found.values())) for key, found in sorted(measured.items()))
    head = ("stage", "group", "relative error", f"of the last {WINDOW}", "cosine", "best scale", "measured", "")
    cells = "".join(f"<th scope=col>{text}</th>" for text in head)
    return (
        "<section><h2>Weight prediction</h2><p>What had been predicted for a version, held against the weights that came: relative "
        "error 0 is perfect, 1 as good as no prediction; best scale is the factor on the predicted step that would have fitted "
        "best.</p><div class=scroll tabindex=0 role=region aria-label=Prediction>"
        f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div></section>"
    )


def _line(stage: int, group: int, found: list[dict[str, Any]]) -> str:
    worse = "worse than none" if found[-1]["worse"] else ""
    means = [_mean(found, "relative_error"), _mean(found[-WINDOW:], "relative_error")]
    means += [_mean(found, "cosine"), _mean(found, "best_scale")]
    cells = "".join(f"<td>{text}</td>" for text in [str(group), *means, f"{len(found):,}", worse])
    return f"<tr><th scope=row>{stage}</th>{cells}</tr>"


def _mean(found: list[dict[str, Any]], name: str) -> str:
    values = [entry[name] for entry in found if entry[name] is not None]
    return f"{sum(values) / len(values):.2f}" if values else "none"
