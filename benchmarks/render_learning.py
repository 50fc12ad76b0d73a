"""The tables and numbers of docs/results.md, from benchmarks/results/learning.json; `python benchmarks/render.py` writes them.

``<!-- learning: chars/8x8/adamw -->`` is followed by the table of that setting, and
``<!-- learned: chars/8x8/adamw | pipeoptim, in progress | share -->`` by one number: loss, share,
updates, slots (times as long for synchronous training to the same loss, in slots of equal stages) or measured (the same with the
throughput that benchmarks/results/efficiency.json holds of both on emulated devices).
"""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from learning import CONTENDERS, RESULT, SEEDS, SETTINGS, SHORTER, TASKS, Contender, Ledger, Run, Setting

from pipeoptim.methods import refresh_every

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results.md"
EFFICIENCY = ROOT / "benchmarks" / "results" / "efficiency.json"

_TABLE = re.compile(r"(<!-- learning: (?P<what>[^>]*?) -->\n).*?(\n<!-- end -->)", re.DOTALL)
_NUMBER = re.compile(r"(<!-- learned: (?P<what>[^>]*?) -->).*?(<!-- end -->)", re.DOTALL)
_MACHINE = re.compile(r"(<!-- learned on -->).*?(<!-- end -->)", re.DOTALL)
_MISSING = "not yet run"


@dataclass(frozen=True)
class Learned:
    """What one contender reached at its best learning rate: final validation loss of each seed."""

    rate: float
    losses: list[float]
    copies: int

    @property
    def mean(self) -> float:
        return statistics.mean(self.losses)

    def __str__(self) -> str:
        if len(self.losses) < len(SEEDS):
            return f"{self.mean:.3f} ({len(self.losses)} of {len(SEEDS)} seeds)"
        return f"{self.mean:.3f} ({min(self.losses):.3f} .. {max(self.losses):.3f})"


def learned(ledger: Ledger, setting: Setting, name: str) -> Learned | None:
    """None where its learning rate is not found yet."""
    best = ledger.best(setting, CONTENDERS[name])
    if best is None:
        return None
    runs: list[Run] = [replace(best, seed=seed) for seed in SEEDS]
    losses = [loss for run in runs if run.key in ledger.runs and (loss := ledger.loss(run)) is not None]
    return Learned(best.rate, losses, ledger.runs[best.key]["weight_copies"])


def share(ledger: Ledger, setting: Setting, name: str) -> float | None:
    """Of the gap between synchronous training and naive or PipeDream, whichever is better, how much ``name`` closes."""
    ours, synchronous = learned(ledger, setting, name), learned(ledger, setting, "1f1b")
    others = [learned(ledger, setting, other) for other in ("naive", "pipedream")]
    if ours is None or synchronous is None or None in others:
        return None
    without = min(other.mean for other in others if other)
    return (without - ours.mean) / (without - synchronous.mean)


def percent(part: float) -> str:
    """With a digit behind the point, so that what is just short of a round number does not look as if it had reached it."""
    return f"{100 * part:.1f} %"


def updates_of_1f1b(ledger: Ledger, setting: Setting, name: str) -> float | None:
    """How many updates synchronous training needs for the loss of ``name``: between runs of several lengths, linearly."""
    ours, steps = learned(ledger, setting, name), TASKS[setting.task](setting.depth, setting.microbatches).steps
    known = [(length, learned(ledger, setting, shorter)) for shorter, length in SHORTER.items()]
    known.append((steps or 0, learned(ledger, setting, "1f1b")))
    points = [(length, found.mean) for length, found in known if found is not None]
    if ours is None:
        return None
    for (fewer, above), (more, below) in pairwise(points):
        if below <= ours.mean <= above:
            return fewer + (more - fewer) * (above - ours.mean) / (above - below)
    return None


def table(ledger: Ledger, setting: Setting) -> str:
    """All contenders of one setting that have been run."""
    rows = [
        "| method | copies | learning rate | final validation loss (lowest .. highest) | gap closed |",
        "|---|---|---|---|---|",
    ]
    settings = [s for s in SETTINGS if s.name == setting.name]
    for name in dict.fromkeys(name for s in settings for name in s.contenders):
        found = learned(ledger, setting, name)
        if found is None:
            continue
        part = None if name.startswith("1f1b") else share(ledger, setting, name)
        closed = "" if part is None else percent(part)
        rows.append(f"| {name} | {found.copies} | {found.rate:g} | {found} | {closed} |")
    return "\n".join(rows)


def number(ledger: Ledger, what: str) -> str:
    """One number in a sentence."""
    place, name, kind = (part.strip() for part in what.split("|"))
    setting = next(s for s in SETTINGS if s.name == place)
    found = learned(ledger, setting, name)
    value: float | None
    if kind == "loss":
        return _MISSING if found is None else f"{found.mean:.3f}"
    if kind == "share":
        value = share(ledger, setting, name)
        return _MISSING if value is None else percent(value)
    value = updates_of_1f1b(ledger, setting, name)
    if value is None:
        return _MISSING
    if kind == "updates":
        return f"{value:,.0f}"
    assert kind in ("slots", "measured"), kind
    steps = TASKS[setting.task](setting.depth, setting.microbatches).steps or 0
    slower = slots_of_a_flush(setting) if kind == "slots" else measured_of_torch(setting, CONTENDERS[name])
    if slower is None:
        return _MISSING
    flushed = CONTENDERS[name].fields.get("synchronous_updates", 0)  # of ours: these take as long as those of 1F1B
    return f"{value * slower / (steps - flushed + flushed * slower):.2f}"


def slots_of_a_flush(setting: Setting) -> float:
    """How much longer an update takes with a flush, in slots of equal stages: M+D-1 instead of M."""
    return (setting.microbatches + setting.depth - 1) / setting.microbatches


def measured_of_torch(setting: Setting, contender: Contender) -> float | None:
    """How much longer an update took on emulated devices with torch's best schedule; None where it was not measured."""
    ours, torchs = [], []
    refresh = refresh_every(contender.fields.get("prediction", "none"), None)
    for row in json.loads(EFFICIENCY.read_text())["rows"]:
        place = row["settings"]
        if (place["depth"], place["microbatches"]) == (setting.depth, setting.microbatches) and _equal_stages(place):
            samples = statistics.median(row["samples"])
            if place["method"] == contender.method and place.get("refresh") == refresh:
                ours.append(samples)
            elif not place["ours"]:
                torchs.append(samples)
    return ours[-1] / max(torchs) if ours and torchs else None


def _equal_stages(place: dict[str, Any]) -> bool:
    """Without anything that favours one of the two."""
    return not (any(place[what] for what in ("uneven", "jitter", "delay", "bandwidth", "gloo")) or place.get("slack"))


def machine_line() -> str:
    """What the newest runs were made on."""
    known = json.loads(RESULT.read_text())["machine"]
    versions = f"torch {known['torch']}, Python {known['python']}, pipeoptim {known['pipeoptim']}"
    return f"{known['cores']} cores of {known['processor']}; {versions}"


def render(text: str) -> str:
    """``text`` with everything behind its marks written anew."""
    ledger = Ledger(RESULT)
    text = _MACHINE.sub(lambda match: match[1] + machine_line() + match[2], text)
    by_name = {setting.name: setting for setting in SETTINGS}
    text = _TABLE.sub(lambda match: match[1] + table(ledger, by_name[match["what"]]) + match[3], text)
    return _NUMBER.sub(lambda match: match[1] + number(ledger, match["what"]) + match[3], text)
