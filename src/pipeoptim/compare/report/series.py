"""The curves of a page as plain data, thinned to what a screen can show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from pipeoptim.compare.facts import family
from pipeoptim.compare.outcome import Outcome
from pipeoptim.compare.statistics import Curve, smooth
from pipeoptim.compare.summary import Comparison
from pipeoptim.methods import METHODS, get_method

#: Points per curve at most.
POINTS = 400

#: At first a point of a training curve is the mean of this part of its points.
SMOOTH = 30

#: Colours that the style sheet has: for asynchronous methods, and for synchronous ones.
HUES, GREYS = 10, 2

#: How lines that share a colour are told apart: solid, dashed, dotted, both.
DASHES = ("none", "7 3", "2 2", "7 2 2 2")

#: Part of a run whose steep beginning may be above the top of the chart.
BEGINNING = 0.2


@dataclass
class Line:
    """One curve: ``x`` steps, ``y`` losses; ``lost`` where it ended in divergence."""

    x: list[int]
    y: list[float]
    lost: bool = False


@dataclass
class Series:
    """What the charts draw of one method; the page makes means, bands and smooth curves of it.

    Args:
        name: of the method.
        colour: name of a variable of the style sheet.
        dash: stroke-dasharray of the line, for those that share a colour.
        train, validation: a line for each seed; where a run has more than ``POINTS`` steps, means of neighbouring ones.
        seconds: mean time of a step, to draw it over time; None where times are those of one core.
    """

    name: str
    colour: str
    dash: str
    train: list[Line]
    validation: list[Line]
    seconds: float | None = None


def comparison_series(comparison: Comparison) -> list[Series]:
    """One per method that took part."""
    looks = _looks(comparison.settings.methods)
    timed = comparison.settings.config.engine == "processes"
    return [_series(name, *looks[name], comparison.of(name), timed) for name in comparison.methods]


def run_series(run: Outcome) -> list[Series]:
    """Of a single run."""
    return [_series(run.method, *_looks([run.method])[run.method], [run], timed=True)]


def _series(name: str, colour: str, dash: str, outcomes: Sequence[Outcome], timed: bool) -> Series:
    rates = [o.seconds_per_step for o in outcomes if o.finished and o.seconds_per_step is not None]
    return Series(
        name,
        colour,
        dash,
        train=[_line(o.train, not o.finished) for o in outcomes if o.train.steps],
        validation=[_line(o.validation, not o.finished) for o in outcomes if o.validation.steps],
        seconds=sum(rates) / len(rates) if timed and rates else None,
    )


def _line(curve: Curve, lost: bool) -> Line:
    x, y = thinned(curve.steps, curve.values)
    return Line(x, y, lost)


def thinned(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """At most ``POINTS`` points: means of neighbouring values, each at the last of their steps.

    >>> thinned([1, 2, 3], [2.0, 4.0, 6.0])
    ([1, 2, 3], [2.0, 4.0, 6.0])
    """
    count = min(len(steps), POINTS)
    edges = [round(n * len(steps) / count) for n in range(count + 1)] if count else []
    pieces = list(pairwise(edges))
    return [steps[b - 1] for _, b in pieces], [_rounded(sum(values[a:b]) / (b - a)) for a, b in pieces]


def _looks(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and dash of each method, the same on every page: grey for synchronous ones, a hue for each other, dashed for its
    variants."""
    looks: dict[str, tuple[str, str]] = {}
    families: list[str] = []
    greys = 0
    for name in [*METHODS, *(n for n in names if n not in METHODS)]:
        if get_method(name).program(1, 1).flushes:
            looks[name] = (f"--grey-{greys % GREYS}", DASHES[:3:2][greys // GREYS % 2])
            greys += 1
            continue
        if family(name) not in families:
            families.append(family(name))
        colour = f"--hue-{families.index(family(name)) % HUES}"
        same = sum(other == colour for other, _ in looks.values())
        looks[name] = (colour, DASHES[same % len(DASHES)])
    return looks


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def axis_top(series: Sequence[Series]) -> float | None:
    """The top of the loss axis, so that the ends of the curves can be told apart; the page says what lies above.

    It shows every end, and what most curves do after the beginning of the run; the spike of one may lie above.
    """
    lines = [line for one in series for line in (*one.train, *one.validation) if not line.lost]
    if not lines:
        return None
    smoothed = [(line.x, smooth(line.y, max(1, len(line.y) // SMOOTH))) for line in lines]
    highest = [max(v for at, v in zip(x, y, strict=True) if at >= BEGINNING * x[-1]) for x, y in smoothed]
    return max(1.25 * median(highest), *(y[-1] for _, y in smoothed))


def chart_data(series: Sequence[Series], top: float | None) -> dict[str, Any]:
    """What the page's script reads."""
    lines = [line for one in series for line in (*one.train, *one.validation)]
    lowest = [v for line in lines for v in line.y if not line.lost]
    ends: list[float] | None = None
    if top is not None and lowest:
        margin = 0.04 * (top - min(lowest))
        ends = [min(lowest) - margin, top + margin]
    last = max((line.x[-1] for line in lines), default=1)
    return {"series": [asdict(one) for one in series], "range": ends, "last": last, "beginning": BEGINNING, "smooth": SMOOTH}
