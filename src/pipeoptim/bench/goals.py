"""The goals for this library's speed and memory, each compared with the result files: reached, or missed by how much."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeoptim.bench.efficiency import ALONE, conditions
from pipeoptim.bench.record import Record, ResultRow
from pipeoptim.schedule import Slack, read_slack
from pipeoptim.schedule.slack import forwards_ahead

REALISTIC = ("gpt", "resnet101", "gnmt8")


OF_PLAIN_LOOPS: dict[tuple[float, float, Slack], dict[int, float]] = {
    (10.0, 0.0, 0.0): {2: 0.99, 4: 0.99, 8: 0.99, 16: 0.97},
    (2.0, 0.0, 0.0): {2: 0.97, 4: 0.97},
    (10.0, 0.003, 1.0): {4: 0.97, 8: 0.97},
    (10.0, 0.01, 2.0): {4: 0.97, 8: 0.97},
}
"""Efficiency beside that of plain loops of the same run: milliseconds of a stage, seconds of delay and slack -> depth -> the goal."""
CONDITIONS = ("uneven", "jitter", "delay", "bandwidth", "gloo")


@dataclass(frozen=True)
class Goal:
    """``value`` was measured for ``what`` and ought to be at least ``least``, or at most ``most``."""

    what: str
    value: float
    least: float | None = None
    most: float | None = None
    beside: str = ""  # another measurement that explains part of a miss

    @property
    def missing(self) -> float:
        """By how much it is missed; 0 where it is reached."""
        below = 0.0 if self.least is None else self.least - self.value
        above = 0.0 if self.most is None else self.value - self.most
        return max(0.0, below, above)

    def sentence(self) -> str:
        """In words.

        >>> Goal("efficiency", 0.95, least=0.97).sentence()
        'efficiency: 0.950, **0.020 short of the goal** of at least 0.97'
        """
        wanted = f"at least {self.least:g}" if self.least is not None else f"at most {self.most:g}"
        beside = f" ({self.beside})" if self.beside else ""
        if not self.missing:
            return f"{self.what}: {self.value:.3f}; goal reached ({wanted}){beside}"
        side = "short of" if self.least is not None else "above"
        return f"{self.what}: {self.value:.3f}, **{self.missing:.3f} {side} the goal** of {wanted}{beside}"


def goals(folder: Path) -> list[Goal]:
    """All goals that the result files in ``folder`` have figures for."""
    found: list[Goal] = []
    readers = {
        "efficiency": _efficiency,
        "throughput": _throughput,
        "memory": _memory,
        "predict": _predict,
        "refresh": _refresh,
        "two_sites": _two_sites,
    }
    for name, read in readers.items():
        path = folder / f"{name}.json"
        if path.is_file():
            found += read(Record.read(path))
    return found


def markdown(folder: Path) -> str:
    """The goals as a list, those that are missed first."""
    every = sorted(goals(folder), key=lambda goal: goal.missing == 0)
    missed = sum(goal.missing > 0 for goal in every)
    return "\n".join(
        [f"Missed: {missed} of {len(every)} goals that were measured.", "", *(f"- {goal.sentence()}" for goal in every)]
    )


def _efficiency(record: Record) -> Iterator[Goal]:
    def plain(row: ResultRow) -> bool:
        return not any(row.settings.get(what) for what in CONDITIONS)

    alone = {(_told(row), row.settings["microbatches"]): row.median for row in record.rows if row.settings["method"] == ALONE}
    for row in record.rows:
        s = row.settings
        # A later run under the same conditions, say with another slack, has replaced the row of these plain loops.
        beside = s.get("plain loops", alone.get((_told(row), 1)))
        if s["method"] != "pipeoptim" or s["microbatches"] != 1 or "refresh" in s or s.get("gloo"):
            continue
        what = f"{s['depth']} stages of {s['milliseconds']:g} ms{conditions(s)}: pipeoptim"
        least = OF_PLAIN_LOOPS.get((s["milliseconds"], s["delay"], read_slack(s.get("slack", "0"))), {}).get(s["depth"])
        if least and beside and not s["uneven"] and not s["jitter"] and not s["bandwidth"]:
            yield Goal(f"{what} over plain loops", row.median / beside, least=least, beside=f"{ALONE}: {beside:.3f}")
        if "ideal" in s and s.get("slack") == "1":
            ideal = f"what the program allows: {s['ideal']:.3f}"
            if "ideal with own work" in s:  # a loop without a pipeline would not do better
                ideal += f", and with the work of plain loops between the waits: {s['ideal with own work']:.3f}"
            yield Goal(
                f"{what} over what its program allows with the same draws", row.median / s["ideal"], least=0.98, beside=ideal
            )
    deep = [row for row in record.rows if (row.settings["depth"], row.settings["microbatches"]) == (8, 8) and plain(row)]
    ours = max((row.median for row in deep if row.settings["method"] == "pipeoptim"), default=0.0)
    rival = max((row.median for row in deep if not row.settings["ours"]), default=0.0)
    if ours and rival:
        yield Goal("8 stages, M = 8: pipeoptim over the best synchronous schedule of torch", ours / rival, least=1.6)


def _told(row: ResultRow) -> tuple[Any, ...]:
    return tuple(row.settings.get(what) for what in ("depth", "milliseconds", *CONDITIONS))


def _throughput(record: Record) -> Iterator[Goal]:
    groups: dict[tuple[Any, Any], list[ResultRow]] = {}
    for row in record.rows:
        s = {**record.settings, **row.settings}
        groups.setdefault((s["model"], s["batch"]), []).append(row)
    for (model, batch), rows in groups.items():
        best = {
            name: max((row.median for row in rows if row.settings["method"] == name), default=0.0)
            for name in ("pipeoptim", "naive")
        }
        rival = max((row.median for row in rows if not row.settings["ours"]), default=0.0)
        where = f"{model}, mini-batch {batch}"
        if best["pipeoptim"] and rival and (model in REALISTIC or (model, batch) == ("mlp", 64)):
            least = 1.0 if model in REALISTIC else 1.5
            yield Goal(f"{where}: pipeoptim over the best of torch", best["pipeoptim"] / rival, least=least)
        if best["pipeoptim"] and best["naive"] and model in REALISTIC:
            yield Goal(f"{where}: pipeoptim over naive", best["pipeoptim"] / best["naive"], least=0.97)


def _memory(record: Record) -> Iterator[Goal]:
    rows = [row.settings for row in record.rows if row.settings["method"] == "pipeoptim"]
    if rows:
        yield Goal(
            "weights of pipeoptim, most copies of any stage at any depth", max(s["weight_copies"] for s in rows), most=2.02
        )
        most = max(s["in_flight"] / (1 + forwards_ahead(s["slack"], s["depth"], s["stage"])) for s in rows)
        what = "activations of pipeoptim over those of ceil((1+x)(D-1-k))+1 micro-batches with slack x, the most of any stage"
        yield Goal(what, most, most=1.0)


def _predict(record: Record) -> Iterator[Goal]:
    """On one thread: with all cores the machine's memory is measured, not the work."""
    rows = [row.settings for row in record.rows if row.settings["threads"] == 1 and "ratio" in row.settings]
    ratios = {(s["optimizer"], s["what"]): s["ratio"] for s in rows}
    for name in ("AdamW", "Adam", "SGD momentum"):
        fused = ratios.get((name, "fused step and predict"))
        if fused:
            passes = next(s["model_ratio"] for s in rows if (s["optimizer"], s["what"]) == (name, "fused step and predict"))
            yield Goal(
                f"{name}, step and prediction on one thread, over torch's step",
                fused,
                most=1.15,
                beside=f"by passes {passes:.2f}",
            )
    apart = {}
    for name in dict.fromkeys(s["optimizer"] for s in rows):
        ways = [ratios[name, what] for what in ("step, then predict", "step, displacement") if (name, what) in ratios]
        if (name, "fused step and predict") not in ratios and ways:
            apart[name] = min(ways)
    if apart:
        worst = max(apart, key=lambda name: apart[name])
        what = f"optimizers without a fused step, by rule or last displacement, the most expensive ({worst})"
        yield Goal(f"{what}, over torch's step", apart[worst], most=1.6)


def _two_sites(record: Record) -> Iterator[Goal]:
    """Over a link of 20 ms and 100 Mbit/s, with the slack that hides it: beside torch's schedules, and beside itself without the link."""
    over = {
        (row.settings["contender"].startswith("Schedule"), row.settings["link"], row.settings["slack"]): row.median
        for row in sorted(record.rows, key=lambda row: row.median)  # the best of each comes last
        if not row.settings["compress"] and row.settings["contender"].startswith(("Schedule", "pipeoptim"))
    }
    link, none, slack = "20 ms, 100 Mbit/s", "no delay, no limit", "0,2,0"
    ours, torchs, alone = (over.get(key) for key in ((False, link, slack), (True, link, "0"), (False, none, slack)))
    if ours is not None and torchs is not None:
        yield Goal(f"two sites, {link}: pipeoptim with slack {slack} over the best of torch", ours / torchs, least=4.0)
    if ours is not None and alone is not None:
        yield Goal(f"two sites, {link}: pipeoptim with slack {slack} over the same without the link", ours / alone, least=0.95)


def _refresh(record: Record) -> Iterator[Goal]:
    for row in record.rows:
        s = row.settings
        if (s["depth"], s["refresh"]) == (8, 1):
            what = f"{row.name}: throughput over one prediction per update"
            yield Goal(what, row.median, least=0.95)
