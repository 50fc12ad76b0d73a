"""All stages of a pipeline under several kinds of prediction, and what follows for learning rate, momentum and M."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeoptim.errors import ConfigError
from pipeoptim.stability.bound import largest_stable_rate
from pipeoptim.stability.error_terms import pays_above
from pipeoptim.stability.linear_stage import LinearStage
from pipeoptim.stability.optimizers import LinearOptimizer, linear_optimizer

COMPARED = ("none", "refined", "decayed", "in_progress")
"""Kinds that differ; at a constant learning rate "displacement" is "refined", and so is "paper" but for Nesterov's momentum."""

MOMENTA = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
"""What is tried for the advice."""

MOST_IN_FLIGHT, MOST_SECONDS = 64, 5.0
"""Of a stage, beyond which its eigenvalues take long; of the whole table."""

Stages = Callable[[LinearOptimizer, str], Sequence[LinearStage]]
"""The stages to study with an optimizer and a kind of prediction."""


@dataclass(frozen=True)
class StageBounds:
    """One stage.

    Attributes:
        stage: k.
        gap: its largest version gap in steady state.
        bounds: kind of prediction -> largest stable ``lr * h``.
        pays_above: kind -> ratio of gradient to noise above which it errs less than no prediction (:func:`pays_above`).
    """

    stage: int
    gap: int
    bounds: dict[str, float]
    pays_above: dict[str, float]

    @property
    def best(self) -> str:
        """The kind with the largest bound, and of equal ones the simplest."""
        most = max(self.bounds.values())
        return next(kind for kind, bound in self.bounds.items() if bound > 0.999 * most)


@dataclass(frozen=True)
class Study:
    """What is known of a pipeline.

    Attributes:
        optimizer: of all stages.
        synchronous: largest stable ``lr * h`` without any gap.
        stages: one each.
        advice: what follows, in sentences.
    """

    optimizer: LinearOptimizer
    synchronous: float
    stages: tuple[StageBounds, ...]
    advice: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def study(stages: Stages, optimizer: LinearOptimizer, kinds: Sequence[str] = COMPARED) -> Study:
    """The bounds of all stages under all ``kinds``.

    Raises:
        ConfigError: it would take long.

    Example:
        >>> from pipeoptim.schedule import Program
        >>> program = Program("async_1f1b", 4)
        >>> found = study(lambda opt, kind: [LinearStage(program, 0, opt, kind)], linear_optimizer("adam"))
        >>> found.stages[0].gap, found.stages[0].best
        (3, 'refined')
    """
    models = {kind: stages(optimizer, kind) for kind in kinds}
    first = models[kinds[0]]
    _check_work(first, len(kinds))
    rows = []
    for j, stage in enumerate(first):
        gap = stage.largest_gap
        bounds = {kind: largest_stable_rate(models[kind][j]) for kind in kinds}
        rows.append(StageBounds(stage.k, gap, bounds, {kind: pays_above(optimizer, kind, gap) for kind in kinds if gap}))
    return Study(optimizer, optimizer.synchronous_bound, tuple(rows), tuple(_advice(first[0], optimizer, rows)))


def _check_work(stages: Sequence[LinearStage], kinds: int) -> None:
    in_flight = [stage.program.in_flight(stage.k) for stage in stages]
    if max(in_flight) > MOST_IN_FLIGHT:
        raise ConfigError(
            f"{max(in_flight)} micro-batches are in flight on a stage, at most {MOST_IN_FLIGHT} are computed; set stages, gap or slack to "
            "less"
        )
    # Measured: eigenvalues at 2e6 entries cubed per second, actions at 3e4 times entries.
    m = stages[0].program.microbatches
    seconds = kinds * sum((n + 4) ** 3 / 2e6 + m * (n + 4) / 3e4 for n in in_flight)
    if seconds > MOST_SECONDS:
        raise ConfigError(
            f"{len(stages)} stages with {m} micro-batches would take {seconds:.0f} seconds or so; set stages or microbatches to less"
        )


def _advice(stage: LinearStage, optimizer: LinearOptimizer, rows: Sequence[StageBounds]) -> list[str]:
    """Sentences on the stage with the smallest bounds, which limits the others: they share a learning rate."""
    worst = min(rows, key=lambda row: max(row.bounds.values()))
    if worst.gap == 0:
        return [f"No stage has a gap: lr * h may be up to {optimizer.synchronous_bound:.3g}, as in synchronous training."]
    best = worst.best
    said = [
        f"Learning rate: stage {worst.stage} limits it. With prediction {best!r} lr * h may be up to {worst.bounds[best]:.3g} there, "
        f"{optimizer.synchronous_bound / worst.bounds[best]:.3g} times less than without a gap."
        if best != "none"
        else f"Learning rate: stage {worst.stage} limits it, to lr * h up to {worst.bounds[best]:.3g}; no prediction here makes it more."
    ]
    here = replace(stage, k=worst.stage, prediction=best)
    said += _about_momentum(here, optimizer, worst.bounds[best])
    said += _about_microbatches(here, worst.bounds[best])
    said += [
        f"Noise: {kind!r} predicts {worst.gap} updates worse than nothing where a gradient is less than {ratio:.2g} of its own noise."
        for kind, ratio in worst.pays_above.items()
        if ratio > 0
    ]
    return said


def _about_momentum(stage: LinearStage, optimizer: LinearOptimizer, bound: float) -> list[str]:
    if not optimizer.decay:
        return []
    others = [linear_optimizer(optimizer.name, momentum) for momentum in MOMENTA]
    # In units of what a gradient moves in the end, so that heavy ball of different mu can be compared.
    tried = {other.decay: largest_stable_rate(replace(stage, optimizer=other)) * other.gain for other in others}
    best = max(tried, key=lambda momentum: tried[momentum])
    more = tried[best] / (bound * optimizer.gain)
    if more < 1.05:
        return [
            f"Momentum: {optimizer.decay:g} is about the best of {', '.join(f'{m:g}' for m in MOMENTA)} for stability here."
        ]
    return [
        f"Momentum: {best:g} instead of {optimizer.decay:g} would let each gradient move the weights {more:.2g} times as far."
    ]


def _about_microbatches(stage: LinearStage, bound: float) -> list[str]:
    """What M = D would change; of orders and kinds as they are."""
    program = stage.program
    if program.microbatches >= program.depth or stage.age is not None:
        return []
    split = replace(stage, program=replace(program, microbatches=program.depth), ahead=None)
    more = largest_stable_rate(split) / bound
    return [
        f"Micro-batches: M = {program.depth} instead of {program.microbatches} would bear a rate {more:.2g} times as high: "
        f"the gap of that stage is then {split.largest_gap}, of its first micro-batches only."
    ]
