"""How good a run's weight predictions were: a line and a row per stage and parameter group, from its metrics.jsonl."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from pipeoptim.compare.report.sections import sortable_heads
from pipeoptim.compare.report.series import HUES, thinned
from pipeoptim.telemetry.metrics import read_rows
from pipeoptim.telemetry.prediction import WINDOW
from pipeoptim.train.rundir import RunDir


def predictions(path: Path) -> tuple[str, list[dict[str, Any]]]:
    """The section and the lines of its chart; both empty where nothing was measured."""
    measured: dict[tuple[int, int], dict[int, dict[str, Any]]] = defaultdict(dict)
    for row in read_rows(RunDir(path).metrics):
        for entry in row.get("prediction", ()):
            measured[entry["stage"], entry["group"]][entry["version"]] = entry
    if not measured:
        return "", []
    body = "".join(_line(*key, list(found.values())) for key, found in sorted(measured.items()))
    head = (
        "stage",
        "group",
        "relative error",
        f"of the last {WINDOW}",
        "cosine",
        "best scale",
        "scale over time",
        "measured",
        "verdict",
    )
    several = any(group for _, group in measured)
    curves = [_curve(*key, found, several) for key, found in sorted(measured.items())]
    legend = " ".join(f'<span><i style="background:var({one["colour"]})"></i>{one["name"]}</span>' for one in curves)
    section = (
        "<section><h2>Weight prediction</h2><p>What had been predicted for a version, held against the weights that came: relative "
        "error 0 is perfect, 1 as good as no prediction; best scale is the factor on the predicted step that would have fitted "
        "best. Scale over time: the factor that predictions were made with, at equal distances from the first to the last.</p>"
        f"<figure><figcaption class=legend>Relative error: {legend}</figcaption><div id=prediction class=chart></div></figure>"
        "<div class=scroll tabindex=0 role=region aria-label=Prediction>"
        f"<table class=sortable><thead><tr>{sortable_heads(head)}</tr></thead><tbody>{body}</tbody></table></div></section>"
    )
    return section, curves


def _curve(stage: int, group: int, found: dict[int, dict[str, Any]], several: bool) -> dict[str, Any]:
    """The error of one stage (and group) over its versions."""
    there = {
        version: entry["relative_error"] for version, entry in sorted(found.items()) if entry["relative_error"] is not None
    }
    x, y = thinned(list(there), list(there.values()))
    name = f"stage {stage}, group {group}" if several else f"stage {stage}"
    return {"name": name, "colour": f"--hue-{stage % HUES}", "x": x, "y": y}


def _line(stage: int, group: int, found: list[dict[str, Any]]) -> str:
    worse = "worse than none" if found[-1]["worse"] else "better than none"
    means = [_mean(found, "relative_error"), _mean(found[-WINDOW:], "relative_error")]
    means += [_mean(found, "cosine"), _mean(found, "best_scale")]
    means.append(_over_time([entry.get("scale", 1.0) for entry in found]))
    cells = "".join(f"<td>{text}</td>" for text in [str(group), *means, f"{len(found):,}", worse])
    return f"<tr><th scope=row>{stage}</th>{cells}</tr>"


def _mean(found: list[dict[str, Any]], name: str) -> str:
    values = [entry[name] for entry in found if entry[name] is not None]
    return f"{sum(values) / len(values):.2f}" if values else "none"


def _over_time(values: list[float], count: int = 5) -> str:
    """Some of ``values``, the first and the last among them; one where all are the same.

    >>> _over_time([1.0, 0.9, 0.8, 0.7, 0.6]), _over_time([1.0, 1.0])
    ('1.00 0.90 0.80 0.70 0.60', '1.00')
    """
    if min(values) == max(values):
        return f"{values[0]:.2f}"
    places = sorted({round(n * (len(values) - 1) / (count - 1)) for n in range(count)})
    return " ".join(f"{values[n]:.2f}" for n in places)
