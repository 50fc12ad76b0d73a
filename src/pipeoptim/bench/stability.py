"""The tables of docs/theory.md: bounds of the learning rate, errors of predictions, and the momentum that bears most.

They are computed, not measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipeoptim.bench.record import Record, ResultRow
from pipeoptim.schedule import Program
from pipeoptim.stability import LinearStage, error_terms, largest_stable_rate, linear_optimizer, pays_above
from pipeoptim.stability.study import COMPARED, MOMENTA

PIPELINES = ((2, 1), (4, 1), (8, 1), (32, 1), (8, 8), (8, 16))
"""D and M; the first stage is shown, which has the largest gap."""

OPTIMIZERS = (("sgd", 0.0), ("momentum", 0.9), ("adam", 0.9), ("adam", 0.99))


def measure() -> Record:
    """All rows of all tables; ``table`` in their settings says which they belong to."""
    return Record("stability", "lr * h", {}, [*_bounds(), *_errors(), *_momenta()], machine={})


def _stage(depth: int, m: int, name: str, momentum: float, kind: str) -> LinearStage:
    return LinearStage(Program("async_1f1b", depth, m), 0, linear_optimizer(name, momentum), kind)


def _bounds() -> Iterator[ResultRow]:
    for name, momentum in OPTIMIZERS:
        for depth, m in PIPELINES:
            found = {kind: largest_stable_rate(_stage(depth, m, name, momentum, kind)) for kind in COMPARED}
            gap = _stage(depth, m, name, momentum, "none").largest_gap
            about = {"table": "bounds", "optimizer": name, "momentum": momentum, "depth": depth, "microbatches": m, "gap": gap}
            synchronous = linear_optimizer(name, momentum).synchronous_bound
            yield ResultRow(
                f"{name} {momentum:g} D={depth} M={m}", [max(found.values())], {**about, "synchronous": synchronous, **found}
            )


def _errors() -> Iterator[ResultRow]:
    for name, momentum in OPTIMIZERS:
        optimizer = linear_optimizer(name, momentum)
        for s in (1, 3, 7, 31):
            about: dict[str, Any] = {"table": "errors", "optimizer": name, "momentum": momentum, "gap": s}
            for kind in COMPARED:
                terms = error_terms(optimizer, kind, s, seen=0.5)
                about[kind] = [terms.constant, terms.drift, terms.noise, pays_above(optimizer, kind, s, seen=0.5)]
            yield ResultRow(f"{name} {momentum:g} s={s}", [about["refined"][2]], about)


def _momenta() -> Iterator[ResultRow]:
    """For Adam, where the rate alone says how far a gradient moves the weights, whatever beta1."""
    for depth in (4, 8, 16):
        for m in (1, depth):
            bounds = {
                (kind, beta1): largest_stable_rate(_stage(depth, m, "adam", beta1, kind))
                for kind in COMPARED
                for beta1 in MOMENTA
            }
            without = max(MOMENTA, key=lambda beta1: bounds["none", beta1])
            best = max(bounds, key=lambda pair: bounds[pair])
            about = {
                "table": "momenta",
                "depth": depth,
                "microbatches": m,
                "usual": bounds["none", 0.9],
                "none": [without, bounds["none", without]],
                "predicted": [*best, bounds[best]],
            }
            yield ResultRow(f"momenta D={depth} M={m}", [bounds[best]], about)


def columns(record: Record) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the table that the rows belong to."""
    make = {"bounds": _bound_columns, "errors": _error_columns, "momenta": _momentum_columns}
    tables = dict.fromkeys(row.settings["table"] for row in record.rows)
    return make[next(iter(tables))]([row.settings for row in record.rows if row.settings["table"] == next(iter(tables))])


def _bound_columns(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    head = ["optimizer", "D", "M", "gap", "no gap", *(_name(kind) for kind in COMPARED)]
    body = []
    for row in rows:
        best = max(row[kind] for kind in COMPARED)
        cells = [_bold(row[kind], row[kind] > 0.999 * best) for kind in COMPARED]
        body.append(
            [_optimizer(row), str(row["depth"]), str(row["microbatches"]), str(row["gap"]), f"{row['synchronous']:.3g}", *cells]
        )
    return head, body


def _error_columns(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    head = ["optimizer", "s", *(_name(kind) for kind in COMPARED), "refined pays above", "in progress pays above"]
    body = []
    for row in rows:
        cells = [", ".join(f"{value:.3g}" for value in row[kind][:3]) for kind in COMPARED]
        pays = [f"{row[kind][3]:.2g}" if row[kind][3] else "always" for kind in ("refined", "in_progress")]
        body.append([_optimizer(row), str(row["gap"]), *cells, *pays])
    return head, body


def _momentum_columns(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    head = ["D", "M", "beta1 = 0.9, no prediction", "best beta1 without prediction", "best beta1 and prediction", "gained"]
    body = []
    for row in rows:
        beta1, bound = row["none"]
        kind, other, most = row["predicted"]
        shown = [
            f"{row['usual']:.3g}",
            f"{bound:.3g} ({beta1:g})",
            f"{most:.3g} ({other:g}, {_name(kind)})",
            f"{most / row['usual']:.2g} times",
        ]
        body.append([str(row["depth"]), str(row["microbatches"]), *shown])
    return head, body


def _name(kind: str) -> str:
    return {"none": "no prediction", "in_progress": "in progress"}.get(kind, kind)


def _optimizer(row: dict[str, Any]) -> str:
    return f"{row['optimizer']} {row['momentum']:g}" if row["momentum"] else str(row["optimizer"])


def _bold(value: float, bold: bool) -> str:
    return f"**{value:.3g}**" if bold else f"{value:.3g}"
