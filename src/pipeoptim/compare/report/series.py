"""The curves of a page as plain data: means with bands over the seeds, thinned to what a screen can show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from pipeoptim.compare.outcome import Outcome
from pipeoptim.compare.statistics import Curve, smooth
from pipeoptim.compare.summary import Comparison
from pipeoptim.methods import METHODS, get_method

#: Points per curve at most.
POINTS = 150

#: Colours that the style sheet has: for asynchronous methods, and for synchronous ones.
HUES, GREYS = 10, 2

#: Part of a run whose steep beginning may be above the top of the chart.
BEGINNING = 0.2


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
    one = _series(run.method, *_looks([run.method])[run.method], [run], timed=True)
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
    """Colour and dash of each method, the same on every page: grey for synchronous ones, a hue for each other, dashed for its
    variants."""
    looks: dict[str, tuple[str, str]] = {}
    families: list[str] = []
    greys = 0
    for name in [*METHODS, *(n for n in names if n not in METHODS)]:
        family = name.split("+")[0].split("(")[0]
        if get_method(name).program(1, 1).flushes:
            looks[name] = (f"--grey-{greys % GREYS}", ("solid", "dot")[greys // GREYS % 2])
            greys += 1
            continue
        if family not in families:
            families.append(family)
        colour = f"--hue-{families.index(family) % HUES}"
        same = sum(other == colour for other, _ in looks.values())
        looks[name] = (colour, ("solid", "dash", "dot", "dashdot")[same % 4])
    return looks


def smoothing(steps: int) -> int:
    """How many training losses a point of the chart is the mean of."""
    return max(1, steps // 30)


def _smoothed(curve: Curve) -> Curve:
    return Curve(curve.steps, smooth(curve.values, smoothing(len(curve.values))))


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
    """The top of the loss axis, so that the ends of the curves can be told apart.

    It shows every end, and what most curves do after the first tenth of the run; the spike of one may lie above.
    """
    bands = [band for one in series for band in (one.train, one.validation) if band.x]
    if not bands:
        return None
    highest = [max(v for x, v in zip(b.x, b.mean, strict=True) if x >= BEGINNING * b.x[-1]) for b in bands]
    return max(1.25 * median(highest), *(band.high[-1] for band in bands))


def chart_data(series: Sequence[Series], top: float | None) -> dict[str, Any]:
    """What the page's script reads."""
    lowest = [v for one in series for band in (one.train, one.validation) for v in band.low]
    bottom = min(lowest) if lowest else None
    ends: list[float] | None
    if top is not None and bottom is not None:
        margin = 0.04 * (top - bottom)
        ends = [bottom - margin, top + margin]
    else:
        ends = None
    last = max((band.x[-1] for one in series for band in (one.train, one.validation) if band.x), default=1)
    return {"series": [asdict(one) for one in series], "range": ends, "last": last}
