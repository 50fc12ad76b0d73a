"""The tables of a benchmark: for the terminal, and as Markdown between two marks in documents.

A document never holds a figure typed by hand. It holds a mark that names a result file, and :func:`render_document` writes the
table of that file behind it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeoptim.bench import (
    computed,
    efficiency,
    memory,
    partition,
    plan_regret,
    scaling,
    simulated,
    slack_model,
    stability,
    transfer,
)
from pipeoptim.bench.goals import markdown as goals
from pipeoptim.bench.predict import columns as predict_columns
from pipeoptim.bench.record import Record, ResultRow
from pipeoptim.errors import PipeOptimError, counted

_MARK = re.compile(
    r"<!-- (?P<what>table|long run): (?P<file>[^ ]+)(?P<where>( \w+=[^ ]+)*) -->\n.*?<!-- end of (?P=what) -->", re.DOTALL
)
_GOALS = re.compile(r"<!-- goals: (?P<folder>[^ ]+) -->\n.*?<!-- end of goals -->", re.DOTALL)


def columns(record: Record) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: name, median, spread, and the ratio to the best contender that is not ours, if there is one."""
    if record.benchmark == "predict":
        return predict_columns(record)
    own = {
        "efficiency": efficiency.columns,
        "memory": memory.columns,
        "scaling": scaling.columns,
        "partition": partition.columns,
        "stability": stability.columns,
        "simulated": simulated.columns,
        "simulated real": simulated.columns,
        "simulated memory": computed.memory_columns,
        "plan regret": plan_regret.columns,
        "simulate at scale": simulated.scale_columns,
        "outside": simulated.outside_columns,
        "slack": slack_model.columns,
    }
    own |= {"transfer": transfer.columns, "transfer loss": transfer.loss_columns}
    if record.benchmark in own:
        return own[record.benchmark](record)
    if record.benchmark == "two sites":
        return _site_columns(record)
    if record.benchmark == "throughput":
        return _throughput_columns(record)
    rivals = [row.median for row in record.rows if row.settings.get("ours") is False]
    head = ["", f"median {record.unit}", "lowest .. highest"] + (["times the best of torch"] if rivals else [])
    body = []
    for row in sorted(record.rows, key=lambda row: -row.median):
        cells = [row.name, _short(row.median), f"{_short(min(row.samples))} .. {_short(max(row.samples))}"]
        body.append(cells + ([f"{row.median / max(rivals):.2f}"] if rivals else []))
    return head, body


def _site_columns(record: Record) -> tuple[list[str], list[list[str]]]:
    """A line per link and contender, beside the best of torch over the same link."""
    best: dict[str, float] = {}
    for row in record.rows:
        if not row.settings["ours"]:
            best[row.settings["link"]] = max(row.median, best.get(row.settings["link"], 0.0))
    body = []
    for row in record.rows:
        s = row.settings
        spread = f"{min(row.samples):.3f} .. {max(row.samples):.3f}"
        times = f"{row.median / best[s['link']]:.1f}" if s["link"] in best else ""
        body.append([s["link"], ("" if s["ours"] else "torch ") + s["contender"], f"{row.median:.3f}", spread, times])
    return ["link, one way", "contender", "efficiency", "lowest .. highest", "times the best of torch"], body


def _throughput_columns(record: Record) -> tuple[list[str], list[list[str]]]:
    """Every contender at its best M: of one model and mini-batch with its samples, of several the ratios to the best of torch."""
    groups: dict[tuple[Any, Any], dict[str, ResultRow]] = {}
    for row in record.rows:
        s = row.settings
        best = groups.setdefault((s.get("model"), s.get("batch")), {})
        name = row.name.split(" M=")[0].rpartition(", ")[2]
        if name not in best or row.median > best[name].median:
            best[name] = row
    rivals = {
        key: max((r for r in rows.values() if not r.settings["ours"]), key=_median, default=None)
        for key, rows in groups.items()
    }
    if len(groups) > 1:
        return _ratios(groups, rivals)
    head = ["", "best M", f"median {record.unit}", "lowest .. highest", "times the best of torch"]
    body = []
    for key, rows in groups.items():
        for name, row in sorted(rows.items(), key=lambda item: -item[1].median):
            cells = [name, str(row.settings["microbatches"]), _short(row.median)]
            cells += [f"{_short(min(row.samples))} .. {_short(max(row.samples))}", _times(row, rivals[key])]
            body.append(cells)
    return head, body


def _ratios(
    groups: dict[tuple[Any, Any], dict[str, ResultRow]], rivals: dict[tuple[Any, Any], ResultRow | None]
) -> tuple[list[str], list[list[str]]]:
    """A line per contender, a column per model and mini-batch, fastest on average first."""
    names = {name: [rows.get(name) for rows in groups.values()] for rows in groups.values() for name in rows}
    lines = {name: [_times(row, rivals[key]) for key, row in zip(groups, found, strict=True)] for name, found in names.items()}

    def average(name: str) -> float:
        known = [float(cell) for cell in lines[name] if cell]
        return sum(known) / len(known)

    body = [[name, *lines[name]] for name in sorted(lines, key=average, reverse=True)]
    absolute = ["" if best is None else _short(best.median) for best in rivals.values()]
    return ["times the best of torch", *(f"{model}, {batch}" for model, batch in groups)], [
        *body,
        ["best of torch, samples/s", *absolute],
    ]


def _times(row: ResultRow | None, rival: ResultRow | None) -> str:
    return "" if row is None or rival is None else f"{row.median / rival.median:.2f}"


def _median(row: ResultRow) -> float:
    return row.median


def caption(record: Record) -> str:
    """One sentence that says on what it was measured."""
    m = record.machine
    if not m:
        return f"{record.benchmark}: computed, the same on every machine."
    where = f"{counted(m['cores'], 'core')} of {m['processor']}" + (f", {', '.join(m['gpus'])}" if m["gpus"] else "")
    settings = ", ".join(f"{k} {v}" for k, v in record.settings.items() if isinstance(v, (int, float, str)))
    return f"{record.benchmark}: {settings}. {where}; torch {m['torch']}, Python {m['python']}, pipeoptim {m['pipeoptim']}."


def markdown(record: Record, of: Callable[[Record], tuple[list[str], list[list[str]]]] = columns) -> str:
    """The table as Markdown, its caption below."""
    head, body = of(record)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cells) + " |" for cells in body]
    return "\n".join([*lines, "", f"*{caption(record)}*"])


def render_document(path: Path, root: Path) -> str:
    """The text of ``path`` with every marked table written anew from its result file below ``root``.

    Raises:
        PipeOptimError: a result file is missing.
    """

    def table(match: re.Match[str]) -> str:
        source = root / match["file"]
        if not source.is_file():
            raise PipeOptimError(f"{path} wants a table of {match['file']}, which does not exist; run the benchmark first")
        record = _where(Record.read(source), match["where"])
        text = markdown(record, scaling.long_columns if match["what"] == "long run" else columns)
        return f"{match[0].splitlines()[0]}\n{text}\n<!-- end of {match['what']} -->"

    text = _MARK.sub(table, path.read_text())
    return _GOALS.sub(lambda m: f"<!-- goals: {m['folder']} -->\n{goals(root / m['folder'])}\n<!-- end of goals -->", text)


def _where(record: Record, conditions: str) -> Record:
    """The rows whose settings are as in ``conditions``, for instance ``model=mlp batch=64``."""
    wanted = dict(part.split("=", 1) for part in conditions.split())
    rows = [row for row in record.rows if all(str(row.settings.get(key)) == value for key, value in wanted.items())]
    return replace(record, rows=rows, settings={**record.settings, **wanted})


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
