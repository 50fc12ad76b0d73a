"""The gain of compressed transfer on slow links: samples per second with activations and gradients uncompressed, as bf16 and as int8.

Two processes train a model over links of a given bandwidth (see :mod:`.slow`: each direction has a link of its own, which holds
messages back for as long as their bytes take). The bytes of a message are counted where it is sent. The contenders take turns in
the same processes, window after window.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage

from pipeoptim.bench import slow
from pipeoptim.bench.checks import runnable
from pipeoptim.bench.models import build, cuts, short_name
from pipeoptim.bench.processes import run_on_processes
from pipeoptim.bench.record import Record, ResultRow
from pipeoptim.bench.throughput import seconds, steps_in
from pipeoptim.engine import Schedule

CONTENDERS = {"as it is": None, "bf16": "bf16", "int8": "int8"}
PROCESSES = 2


def measure(
    models: dict[str, int], megabits: Sequence[float], method: str = "pipeoptim", repeats: int = 5, window: float = 0.5
) -> Record:
    """Measure every model on every link.

    Args:
        models: name (as in :func:`~pipeoptim.bench.models.build`) -> mini-batch.
        megabits: per second, of each link and direction.
        method: trains.
        repeats, window: windows per contender, and about how many seconds each takes.

    Returns:
        One row per model, link and contender, in samples per second.
    """
    runnable([method], [PROCESSES], [1])
    rows: list[ResultRow] = []
    for model, batch in models.items():
        build(model, 1)  # a wrong name is refused here, and not by every process
        for speed in megabits:
            options = {
                "model": model,
                "batch": batch,
                "method": method,
                "megabits": speed,
                "repeats": repeats,
                "window": window,
            }
            found = run_on_processes(
                "pipeoptim.bench.transfer:stage", options, PROCESSES, threads=1, timeout=900, bandwidth=speed * 1e6 / 8
            )
            rows += [ResultRow(**row) for row in found[0]]
    settings = {"method": method, "optimizer": "AdamW", "repeats": repeats, "processes": PROCESSES, "threads": 1}
    return Record("transfer", "samples/s", settings, rows)


def stage(model: str, batch: int, method: str, megabits: float, repeats: int, window: float) -> list[dict[str, Any]]:
    """The part of one process."""
    k = dist.get_rank()
    cut = cuts(build(model, batch), [PROCESSES])[PROCESSES]

    def contender(compress: str | None) -> Any:
        work = build(model, batch)
        module = work.join(*work.blocks[cut[k] : cut[k + 1]])
        place = PipelineStage(module, k, PROCESSES, torch.device("cpu"))
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
        # Through the group, which counts bytes.
        pipe = Schedule(place, optimizer, work.loss_fn, method, compress=compress, liveness_timeout=None, transport="group")
        args, target = ((work.x,) if k == 0 else ()), (work.y if k == PROCESSES - 1 else None)
        return lambda: pipe.step(*args, target=target)

    steps = {name: contender(compress) for name, compress in CONTENDERS.items()}
    counts = {name: steps_in(step, window) for name, step in steps.items()}
    samples: dict[str, list[float]] = {name: [] for name in steps}
    sizes: dict[str, float] = {}
    for _ in range(repeats):
        for name, step in steps.items():
            slow.SENT.clear()
            samples[name].append(batch * counts[name] / seconds(step, counts[name]))
            sizes[name] = _mean(slow.SENT)
    settings = {"model": short_name(model), "batch": batch, "megabits": megabits}
    return [
        {
            "name": f"{short_name(model)}, {batch}, {megabits:g} Mbit/s, {name}",
            "samples": samples[name],
            "settings": {**settings, "transfer": name, "message_bytes": sizes[name]},
        }
        for name in steps
    ]


def _mean(sizes: list[int]) -> float:
    """Of the messages of both processes."""
    total = torch.tensor([float(sum(sizes)), float(len(sizes))])
    dist.all_reduce(total)
    return round(float(total[0] / total[1]))


def columns(record: Record) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: a line per model and link speed, each way of sending beside sending as it is."""
    head = [
        "model",
        "mini-batch",
        "link, Mbit/s",
        "sent",
        "bytes per message",
        "samples/s",
        "lowest .. highest",
        "times as it is",
    ]
    body = []
    plain = {_place(row): row for row in record.rows if row.settings["transfer"] == "as it is"}
    for row in record.rows:
        s = row.settings
        size = f"{s['message_bytes']:,.0f} ({s['message_bytes'] / plain[_place(row)].settings['message_bytes']:.2f})"
        cells = [s["model"], str(s["batch"]), f"{s['megabits']:,g}", s["transfer"], size, f"{row.median:,.0f}"]
        body.append(
            [*cells, f"{min(row.samples):,.0f} .. {max(row.samples):,.0f}", f"{row.median / plain[_place(row)].median:.2f}"]
        )
    return head, body


def _place(row: ResultRow) -> tuple[Any, ...]:
    return row.settings["model"], row.settings["batch"], row.settings["megabits"]


def loss_columns(record: Record) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of ``benchmarks/transfer_loss.py``: every way of sending beside sending as it is, seed by seed."""
    head = ["lr", "sent", "error feedback", "validation loss, mean", "mean change", "standard error", "change by seed"]
    body = []
    plain = {row.settings["lr"]: row.samples for row in record.rows if row.settings["sent"] == "as it is"}
    for row in record.rows:
        s = row.settings
        cells = [f"{s['lr']:g}", s["sent"], s["error_feedback"], f"{mean(row.samples):.4f}"]
        if s["sent"] != "as it is":
            changes = [own - exact for own, exact in zip(row.samples, plain[s["lr"]], strict=True)]
            error = f"{stdev(changes) / len(changes) ** 0.5:.4f}" if len(changes) > 1 else ""
            cells += [f"{mean(changes):+.4f}", error, " ".join(f"{change:+.4f}" for change in changes)]
        body.append([*cells, "", "", ""][: len(head)])
    return head, body
