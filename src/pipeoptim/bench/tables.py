"""The tables of a benchmark: for the terminal, and as Markdown that documents carry between two marks.

A document never holds a figure typed by hand. It holds a mark that names a result file, and :func:`render_document` writes the
table of that file behind it.
"""

from __future__ import annotations

import re
from pathlib import Path

from pipeoptim.bench.predict import columns as predict_columns
from pipeoptim.bench.record import Record
from pipeoptim.errors import PipeOptimError

_MARK = re.compile(r"<!-- table: (?P<file>[^ ]+) -->\n.*?<!-- end of table -->", re.DOTALL)


def columns(record: Record) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: name, median, spread, and the ratio to the best contender that is not ours, if there is one."""
    if record.benchmark == "predict":
        return predict_columns(record)
    if record.benchmark == "partition":
        return _partition_columns(record)
    rivals = [row.median for row in record.rows if row.settings.get("ours") is False]
    head = ["", f"median {record.unit}", "lowest .. highest"] + (["times the best of torch"] if rivals else [])
    body = []
    for row in sorted(record.rows, key=lambda row: -row.median):
        cells = [row.name, _short(row.median), f"{_short(min(row.samples))} .. {_short(max(row.samples))}"]
        body.append(cells + ([f"{row.median / max(rivals):.2f}"] if rivals else []))
    return head, body


def _partition_columns(record: Record) -> tuple[list[str], list[list[str]]]:
    """Each stage beside what was predicted for it, and the slowest beside the slowest predicted."""
    head = ["", "blocks", f"predicted {record.unit}", f"measured {record.unit}", "lowest .. highest", "measured / predicted"]
    body = []
    for row in record.rows:
        predicted = row.settings["predicted"]
        spread = f"{_short(min(row.samples))} .. {_short(max(row.samples))}"
        blocks = str(row.settings["blocks"])
        body.append([row.name, blocks, _short(predicted), _short(row.median), spread, f"{row.median / predicted:.2f}"])
    most, slowest = max(row.settings["predicted"] for row in record.rows), max(row.median for row in record.rows)
    return head, [*body, ["slowest stage", "", _short(most), _short(slowest), "", f"{slowest / most:.2f}"]]


def caption(record: Record) -> str:
    """One sentence that says on what it was measured."""
    m = record.machine
    where = f"{m['cores']} cores of {m['processor']}" + (f", {', '.join(m['gpus'])}" if m["gpus"] else "")
    settings = ", ".join(f"{k} {v}" for k, v in record.settings.items() if isinstance(v, (int, float, str)))
    return f"{record.benchmark}: {settings}. {where}; torch {m['torch']}, Python {m['python']}, pipeoptim {m['pipeoptim']}."


def markdown(record: Record) -> str:
    """The table as Markdown, its caption below."""
    head, body = columns(record)
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
        return f"<!-- table: {match['file']} -->\n{markdown(Record.read(source))}\n<!-- end of table -->"

    return _MARK.sub(table, path.read_text())


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
