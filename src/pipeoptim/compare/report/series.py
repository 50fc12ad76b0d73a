"""The curves of a page as plain data: means with bands over the seeds, thinned to what a screen can show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeoptim.compare.figures import Curve, smooth
from pipeoptim.compare.outcome import Outcome
from pipeoptim.compare.summary import Comparison
from pipeoptim.methods import METHODS, get_method

#: Points per curve at most.
POINTS = 150

#: Colours that the style sheet has: for asynchronous methods, and for synchronous ones.
HUES, GREYS = 10, 2

#: Part of a run whose steep beginning may be above the top of the chart.
BEGINNING = 0.1


@dataclass
class Band:
    """A curve over several seeds: ``x`` steps, and mean, lowest and highest loss."""

    x: list[int] = field(default_factory=list)
    mean: list[float] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)


@dataclass
class Series:
    """What a chart draws of one method.

    Args:
        name: of the method.
        colour: name of a variable of the style sheet.
        dash: how the line is drawn, for those that share a colour.
        train, validation: over the seeds that finished.
        lost: train curves of the seeds that diverged.
        seconds: mean time of a step, to draw it over time; None where times are those of one core.
        faint: every single loss of the only run, where there is only one.
    """

    name: str
    colour: str
    dash: str
    train: Band
    validation: Band
    lost: list[Band] = field(default_factory=list)
    seconds: float | None = None
    faint: Band | None = None


def comparison_series(comparison: Comparison) -> list[Series]:
    """One per method that took part."""
    looks = _looks(comparison.settings.methods)
    timed = comparison.settings.config.engine == "processes"
    return [_series(name, *looks[name], comparison.of(name), timed) for name in comparison.methods]


def run_series(run: Outcome) -> list[Series]:
    """Of a single run: its smoothed losses, and every one of them faintly."""
    one = _series(run.method, "--hue-1", "solid", [run], timed=True)
    thin = _thin(len(run.train.steps))
    values = [run.train.values[i] for i in thin]
    one.faint = Band([run.train.steps[i] for i in thin], values, values, values)
    return [one]


def _series(name: str, colour: str, dash: str, outcomes: Sequence[Outcome], timed: bool) -> Series:
    there = [o for o in outcomes if o.finished]
    rates = [o.seconds_per_step for o in there if o.seconds_per_step is not None]
    return Series(
        name,
        colour,
        dash,
        train=_band([_smoothed(o.train) for o in there]),
        validation=_band([o.validation for o in there]),
        lost=[_band([_smoothed(o.train)]) for o in outcomes if not o.finished and o.train.steps],
        seconds=sum(rates) / len(rates) if timed and rates else None,
    )


def _looks(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and dash of each method: grey for synchronous ones, a hue for each other, dashed for variants of one."""
    looks: dict[str, tuple[str, str]] = {}
    hues: dict[str, int] = {}
    greys = 0
    known = [name for name in METHODS if name in names or any(n.startswith(name + "(") for n in names)]
    for name in [*known, *(n for n in names if n not in known)]:
        family = name.split("+")[0].split("(")[0]
        if get_method(name).program(1, 1).flushes:
            looks[name] = (f"--grey-{greys % GREYS}", ("solid", "dot")[greys % 2])
            greys += 1
            continue
        if family not in hues:
            hues[family] = len(hues)
        same = sum(colour == f"--hue-{hues[family] % HUES}" for colour, _ in looks.values())
        looks[name] = (f"--hue-{hues[family] % HUES}", ("solid", "dash", "dot", "dashdot")[same % 4])
    return looks


def _smoothed(curve: Curve) -> Curve:
    return Curve(curve.steps, smooth(curve.values, max(1, len(curve.values) // 30)))


def _band(curves: Sequence[Curve]) -> Band:
    """Over ``curves`` of the same steps (those of the shortest)."""
    if not curves:
        return Band()
    length = min(len(curve.steps) for curve in curves)
    band = Band()
    for i in _thin(length):
        values = [curve.values[i] for curve in curves]
        band.x.append(curves[0].steps[i])
        band.mean.append(_rounded(sum(values) / len(values)))
        band.low.append(_rounded(min(values)))
        band.high.append(_rounded(max(values)))
    return band


def _thin(length: int) -> list[int]:
    """At most ``POINTS`` indices, evenly spread, first and last among them."""
    if length <= POINTS:
        return list(range(length))
    return [round(i * (length - 1) / (POINTS - 1)) for i in range(POINTS)]


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def axis_top(series: Sequence[Series]) -> float | None:
    """The top of the loss axis: the highest loss after the first tenth of a run, so that the ends can be told apart."""
    after = [
        value
        for one in series
        for band in (one.train, one.validation)
        for x, value in zip(band.x, band.high, strict=True)
        if x >= BEGINNING * band.x[-1]
    ]
    return max(after) if after else None


def chart_data(series: Sequence[Series], top: float | None) -> dict[str, Any]:
    """What the page's script reads."""
    lowest = [v for one in series for band in (one.train, one.validation) for v in band.low]
    bottom = min(lowest) if lowest else None
    if top is not None and bottom is not None:
        margin = 0.04 * (top - bottom)
        return {"series": [asdict(one) for one in series], "range": [bottom - margin, top + margin]}
    return {"series": [asdict(one) for one in series], "range": None}
