"""The table of ``benchmarks/partition.py``: the slowest stage of a cut, beside what was predicted and beside neighbouring cuts."""

from __future__ import annotations

from statistics import median

from pipeoptim.bench.record import Record, ResultRow


def columns(record: Record) -> tuple[list[str], list[list[str]]]:
    """A line per model and depth, and how many of them are within 5 % of the optimum predicted, by what became of freed memory."""
    head = ["", "blocks per stage", "optimum predicted, ms", "slowest stage measured, ms", "measured / predicted"]
    head += ["lowest .. highest", "fastest, slowest cut with a border moved"]
    body = []
    rows = sorted(record.rows, key=lambda row: (row.settings["memory"], row.settings["model"], row.settings["stages"]))
    for row in rows:
        found = ratios(row)
        cells = [row.name, "-".join(map(str, row.settings["lengths"])), f"{median(row.settings['predicted']):.1f}"]
        cells += [f"{row.median:.1f}", f"{median(found):.3f}", f"{min(found):.2f} .. {max(found):.2f}"]
        body.append([*cells, _words([against for _, against in moved(row)])])
    for memory in dict.fromkeys(row.settings["memory"] for row in rows):
        near = [abs(median(ratios(row)) - 1) <= 0.05 for row in rows if row.settings["memory"] == memory]
        body.append([f"within 5 %, memory {memory}", "", "", "", f"{sum(near)} of {len(near)}", "", ""])
    return head, body


def ratios(row: ResultRow) -> list[float]:
    """Measured over predicted, which were measured in turns.

    >>> ratios(ResultRow("x", [2.0, 3.0], {"predicted": [2.0, 2.0]}))
    [1.0, 1.5]
    """
    return [own / predicted for own, predicted in zip(row.samples, row.settings["predicted"], strict=True)]


def moved(row: ResultRow) -> list[tuple[str, float]]:
    """Cuts with one border moved by a block, and the times that the slowest stage takes with them, fastest first.

    >>> moved(ResultRow("x", [2.0, 2.0], {"moved": {"3-1": [4.0, 3.0], "1-3": [2.0, 2.2]}}))
    [('1-3', 1.05), ('3-1', 1.75)]
    """
    found = {
        cut: median(other / own for other, own in zip(samples, row.samples, strict=True))
        for cut, samples in row.settings["moved"].items()
    }
    return sorted(found.items(), key=lambda pair: pair[1])


def _words(times: list[float]) -> str:
    return f"{times[0]:.2f}, {times[-1]:.2f} times ours" if times else ""
