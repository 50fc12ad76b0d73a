"""The table of a comparison as text cells: one function for the terminal, the page and the documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeoptim.compare.plan import flushes
from pipeoptim.compare.statistics import Spread
from pipeoptim.compare.summary import Comparison, MethodSummary
from pipeoptim.config import TrainConfig
from pipeoptim.errors import counted
from pipeoptim.options import RUN_SETTINGS

#: Where there is no figure.
NONE = "\N{EN DASH}"


def _no_key(_: MethodSummary) -> float | None:
    return None


@dataclass(frozen=True)
class Column:
    """A column: its heading, what it means, and its cell and the number it sorts by."""

    heading: str
    meaning: str
    cell: Callable[[MethodSummary], str]
    key: Callable[[MethodSummary], float | None] = _no_key


def columns(comparison: Comparison) -> list[Column]:
    """All columns of ``comparison``; those that would be empty throughout are left out."""
    target = comparison.target
    processes = comparison.settings.config.engine == "processes"
    metrics = [_metric(name) for name in comparison.metric_names()]
    several = len({line.optimizer for line in comparison.lines()}) > 1
    found = [
        Column("method", "name, as after --methods", lambda line: line.method),
        Column("val. loss", "of the last validation", lambda line: _loss(line, line.val_loss), _mean("val_loss")),
        Column(
            "gap closed",
            f"share of what {comparison.uncorrected} loses against {comparison.synchronous} in validation loss",
            lambda line: _share(line.share),
            lambda line: line.share,
        ),
        *metrics,
        Column(
            "train loss", "mean over the last 5 % of the steps", lambda line: _loss(line, line.train_loss), _mean("train_loss")
        ),
        Column(
            "steps to target",
            f"first validation at or below {target:.4g}" if target is not None else "",
            lambda line: _count(line.steps_to_target, line.runs),
            _mean("steps_to_target"),
        ),
        Column(
            "copies",
            "of the weights, the most of any stage",
            lambda line: str(line.weight_copies),
            lambda line: line.weight_copies,
        ),
        Column(
            "weight memory",
            "bytes of weights in mid-flight, measured; the most of any stage",
            lambda line: size(line.weight_bytes),
            lambda line: line.weight_bytes,
        ),
        Column(
            "samples/s",
            "training only, validations not counted"
            + ("" if processes else "; all stages on one core, so no pipeline's speed"),
            lambda line: f"{line.samples_per_second.mean:,.0f}" if line.samples_per_second else NONE,
            _mean("samples_per_second"),
        ),
        Column(
            "time to target",
            "those steps times the mean time of a step, s" + ("" if processes else "; all stages on one core"),
            lambda line: _seconds(line.seconds_to_target, line.runs),
            _mean("seconds_to_target"),
        ),
    ]
    if several:
        found.append(Column("optimizer", "some methods bring their own", lambda line: line.optimizer.split("(")[0]))
    lines = comparison.lines()
    return [column for column in found if any(column.cell(line) not in (NONE, "") for line in lines)]


#: What a narrow terminal does without, first to last.
SPARE = ("time to target", "samples/s", "optimizer", "steps to target", "weight memory", "train loss")


def fitting(found: Sequence[Column], lines: Sequence[MethodSummary], width: int) -> tuple[list[Column], list[str]]:
    """The columns that fit into ``width`` characters, two between them, and the headings of those that do not."""

    def total(columns: Sequence[Column]) -> int:
        return sum(2 + max(len(c.heading), *(len(c.cell(line)) for line in lines)) for c in columns) if lines else 0

    kept, dropped = list(found), list[str]()
    for heading in SPARE:
        if total(kept) <= width:
            break
        dropped += [c.heading for c in kept if c.heading == heading]
        kept = [c for c in kept if c.heading != heading]
    return kept, dropped


def _metric(name: str) -> Column:
    def cell(line: MethodSummary) -> str:
        value = line.metrics.get(name)
        return NONE if value is None else f"{value.mean:.4f}" + (f" ±{value.deviation:.4f}" if value.count > 1 else "")

    def key(line: MethodSummary) -> float | None:
        value = line.metrics.get(name)
        return value.mean if value else None

    return Column(name, "of the last validation", cell, key)


def _mean(field: str) -> Callable[[MethodSummary], float | None]:
    def key(line: MethodSummary) -> float | None:
        spread: Spread | None = getattr(line, field)
        return spread.mean if spread else None

    return key


def _share(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{100 * value:.0f} %" if value >= -1 else "below -100 %"


def _loss(line: MethodSummary, value: Spread | None) -> str:
    text = "" if value is None else f"{value.mean:.4f}" + (f" ±{value.deviation:.4f}" if value.count > 1 else "")
    if line.diverged:
        return f"{text} ({line.diverged} of {line.runs} diverged)".strip() if text else "diverged"
    return text or NONE


def _count(value: Spread | None, runs: int) -> str:
    return NONE if value is None else f"{value.mean:,.0f}" + (f" ({value.count} of {runs})" if value.count < runs else "")


def _seconds(value: Spread | None, runs: int) -> str:
    return NONE if value is None else f"{value.mean:,.1f} s" + (f" ({value.count} of {runs})" if value.count < runs else "")


def size(count: float | None) -> str:
    """Bytes for people.

    >>> size(1536), size(3 * 2**20), size(None) == NONE
    ('1.5 KiB', '3.0 MiB', True)
    """
    if count is None:
        return NONE
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1024
    return f"{count:.1f} GiB"


def setting(config: TrainConfig) -> str:
    """What all runs share, in one line; of the options of the pipeline, those that are not the default."""
    lr = config.optimizer.options.get("lr")
    split = (
        f"{config.microbatches} micro-batches of {config.batch_size // config.microbatches}"
        if config.microbatches > 1
        else f"mini-batches of {config.batch_size}, not split"
    )
    rate = "" if lr is None else f" with lr {lr:g}"
    if config.rate_by_gap:
        rate += f", on a stage with gap s divided by (1 + s)^{config.rate_by_gap:g}"
    chosen = [
        f", {name} {value}"
        for name, known in RUN_SETTINGS.items()
        if name != "prediction" and known.computes and (value := getattr(config, name)) != known.default
    ]
    return f"{counted(config.stages, 'stage')}, {split}, {counted(config.steps, 'step')}, {config.optimizer.target}{rate}{''.join(chosen)}"


def notes(comparison: Comparison) -> Sequence[str]:
    """What must be said with the table: who was left out, what diverged, which methods use an optimizer of their own."""
    settings, lines = comparison.settings, comparison.lines()
    out = [f"{name} was left out: {reason}" for name, reason in comparison.left_out.items()]
    for o in comparison.outcomes:
        if o.status == "diverged":
            out.append(f"{o.method} diverged with seed {o.seed}: {o.reason}.")
        elif o.status == "failed":
            out.append(f"{o.method} failed with seed {o.seed}: {o.reason}. Run the command again to repeat it.")
    alike = [line.method for line in lines if flushes(line.method)]
    if settings.config.rate_by_gap and alike:
        out.append(
            f"All stages have the same learning rate under {', '.join(alike)}: no gradient is old there, so --rate-by-gap divides by 1."
        )
    common = settings.config.optimizer
    for line in lines:
        own = _brings_own(line.method)
        if own and not settings.same_optimizer:
            lr = own_rate(comparison)
            out.append(f"{line.method} uses its own optimizer {line.optimizer} with lr {lr:g}, the others {common.target}.")
        elif own:
            out.append(f"{line.method} brings its own optimizer, but --same-optimizer gave it {common.target}.")
    if len(settings.seeds) == 1:
        out.append("One seed: small differences may be chance. --seeds 3 shows the spread.")
    if settings.config.engine == "emulator":
        out.append(
            "Engine emulator: all stages took turns on one core, so times and samples/s show what a method computes, not how "
            "fast its pipeline is. --engine processes measures that."
        )
    if comparison.share(0.0) is None and comparison.synchronous and comparison.uncorrected:
        out.append(
            f"No share of the gap is given: {comparison.uncorrected} loses no more to {comparison.synchronous} than seeds "
            "differ, or one of them has no final loss."
        )
    return out


def _brings_own(method: str) -> bool:
    from pipeoptim.methods import get_method

    return get_method(method).optimizer is not None


def own_rate(comparison: Comparison) -> float:
    """Learning rate of the optimizers that methods bring along."""
    from pipeoptim.compare.plan import own_lr

    return own_lr(comparison.settings)
