"""`advise`: from what a user has to what to use, with the reasons and what it will cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any, NamedTuple

from pipeoptim.advise.decision import IF_REFUSED, Choice, decide
from pipeoptim.advise.evidence import UNKNOWN, nearest
from pipeoptim.advise.situation import Situation
from pipeoptim.errors import ConfigError
from pipeoptim.methods import copies, get_method
from pipeoptim.schedule import Program

UNEVEN = 1.1
"""From here on a slow stage is worth a new cut."""

TOLERANT = "rotated_adam"
"""The optimizer that loses least where the gap is large."""


@dataclass(frozen=True)
class Advice:
    """What to use.

    Attributes:
        stages: D.
        method, prediction, microbatches, slack: as options of every pipeline; prediction is empty where the method has none.
        backward: "latest", "forward's" or "same": on which weights the backward runs.
        gap: the largest version gap of the first stage.
        copies: the most copies of the weights on any stage.
        asked: the questions that led here, with their answers.
        reasons: why, in sentences.
        cost: what staleness cost where it was measured, or "unknown".
    """

    stages: int
    method: str
    prediction: str
    microbatches: int
    slack: float
    backward: str
    gap: int
    copies: int
    asked: tuple[tuple[str, bool], ...]
    reasons: tuple[str, ...]
    cost: str

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def advise(situation: Situation) -> Advice:
    """What to use in ``situation``: method, M, slack, the backward's weights and the kind of prediction.

    Example:
        >>> found = advise(Situation(stages=8, optimizer="adamw"))
        >>> found.method, found.prediction, found.microbatches, found.gap, found.copies
        ('pipeoptim', 'in_progress', 8, 1, 2)
    """
    choice, asked = decide(situation)
    method, m, depth = get_method(choice.method), situation.m, situation.stages
    flushes = method.program(depth, m).flushes
    slack, of_slack = _slack(situation, flushes)
    program = method.program(depth, m, slack=slack)
    return Advice(
        stages=depth,
        method=choice.method,
        prediction=choice.prediction,
        microbatches=m,
        slack=slack,
        backward="same" if flushes else "forward's" if method.backward.reuses_forward else "latest",
        gap=program.steady_gap(0),
        copies=max(copies(method, depth, m, k, program=program) for k in range(depth)),
        asked=tuple(asked),
        reasons=(
            choice.because,
            *_of_run(situation),
            *_of_microbatches(situation, flushes),
            *of_slack,
            *_of_momentum(situation, choice, program),
            *_of_optimizer(situation, choice),
        ),
        cost=_cost(situation, choice, flushes),
    )


def _of_run(situation: Situation) -> list[str]:
    said = []
    if situation.relative_error is not None:
        said.append(
            f"Measured: predictions err by {situation.relative_error:.2g} of the displacement (no prediction: 1), median at the run's end."
        )
    if situation.slowest is not None and situation.slowest > UNEVEN:
        said.append(
            f"Measured: the slowest stage takes {situation.slowest:.2g} times the mean, and all wait for it; pipeoptim plan --from-run "
            "cuts anew."
        )
    return said


def _slack(situation: Situation, flushes: bool) -> tuple[float, list[str]]:
    if flushes:
        return 0.0, []
    if situation.late is None:
        return 0.0, ["Slack: 0, as it is not known how late messages come; between processes --slack auto measures it."]
    x, ahead = situation.slack, situation.ahead
    if not x:
        return 0.0, [f"Slack: 0, as messages are late by {situation.late:g} times of a stage only."]
    beyond = f", of which it hides {x / 2:g}, the most that is advised" if 2 * situation.late > x else ""
    more = f"; it makes the gap {ceil(ahead / situation.m)} updates, and one from M = {ahead} on" if situation.m < ahead else ""
    return float(x), [f"Slack: {x}, as messages are late by {situation.late:g} times of a stage{beyond}{more}."]


def _of_microbatches(situation: Situation, flushes: bool) -> list[str]:
    m, depth = situation.m, situation.stages
    if situation.microbatches is None and not flushes:
        wanted = "there are stages" if m == depth else "the first stage forwards before its first backward, with this slack"
        enough = m >= max(depth, situation.ahead)
        return [f"M: {m}, " + (f"as many as {wanted}: the gap is one update." if enough else "the most that is possible.")]
    if m >= depth or flushes:
        return []
    possible = situation.most_microbatches is None or situation.most_microbatches >= depth
    return [f"M: a mini-batch split in {depth} instead of {m} would lose far less, at the same speed."] if possible else []


def _of_momentum(situation: Situation, choice: Choice, program: Program) -> list[str]:
    gap = program.steady_gap(0)
    if not choice.prediction or program.microbatches > 1 or situation.momentum == 0 or gap <= 2:
        return []
    now = "unknown" if situation.momentum is None else f"{situation.momentum:g}"
    return [
        f"Momentum: a prediction {gap} updates ahead needs a momentum (beta1) of more than {1 - 2 / gap:.2g} to raise the stable learning "
        f"rate; yours is {now} (pipeoptim stability --gap {gap})."
    ]


def _of_optimizer(situation: Situation, choice: Choice) -> list[str]:
    """Where every mini-batch is an update: the optimizer that bears that best, with what it was measured to lose."""
    if situation.m > 1 or not choice.prediction or situation.optimizer == TOLERANT:
        return []
    found = nearest(situation.stages, 1, TOLERANT, choice.method, choice.prediction)
    return (
        []
        if found is None
        else [
            f"Optimizer: {TOLERANT} bears large gaps better, best after a synchronous start (--synchronous-updates): {found.describe()}."
        ]
    )


def _cost(situation: Situation, choice: Choice, flushes: bool) -> str:
    if flushes:
        m, depth = situation.m, situation.stages
        return f"none: nothing is stale; the pipeline idles {(depth - 1) / (m + depth - 1):.0%} of the time"
    found = nearest(situation.stages, situation.m, situation.optimizer, choice.method, choice.prediction)
    return UNKNOWN if found is None else found.describe()


class Settled(NamedTuple):
    """What ``method="auto"`` stands for.

    Attributes:
        method: its name.
        prediction: kind; None where it predicts nothing.
        line: both, and why, in one line.
    """

    method: str
    prediction: str | None
    line: str


Check = Callable[[str, str | None], None]
"""Raises ConfigError where a method, with a kind of prediction, does not go with all that the user has asked for."""


def automatic(
    depth: int, microbatches: int, momentum: float | None = None, prediction: str | None = None, check: Check | None = None
) -> Settled:
    """What ``method="auto"`` stands for. Only what all processes of a pipeline know enters, so that each finds the same by itself;
    of memory nothing is known, so that what is found never takes more than two copies of the weights.

    Args:
        depth, microbatches, momentum: see :class:`Situation`.
        prediction: the kind that the user asked for; None to choose it as well.
        check: refuses what the user's other options rule out; then the next of ``IF_REFUSED`` is tried.

    Raises:
        ConfigError: everything is refused.

    Example:
        >>> automatic(4, 4)[:2]
        ('pipeoptim', 'in_progress')
    """
    first, _ = decide(Situation(depth, microbatches, momentum=momentum))
    refusals: dict[str, str] = {}
    for choice in (first, *IF_REFUSED):
        kind = (choice.prediction or None) if prediction is None else prediction
        shown = choice.method if kind is None else f"{choice.method} with prediction {kind}"
        if shown in refusals:
            continue
        try:
            if check is not None:
                check(choice.method, kind)
        except ConfigError as error:
            refusals[shown] = str(error)
            continue
        instead = "".join(f" Instead of {other}, for {why}." for other, why in list(refusals.items())[:1])
        line = f"method auto: {shown} (D = {depth}, M = {microbatches}). {choice.because}{instead}"
        return Settled(choice.method, kind, line)
    tried, reasons = list(refusals), list(dict.fromkeys(refusals.values()))
    if len(reasons) == 1:  # nothing that has to do with the method
        raise ConfigError(reasons[0])
    raise ConfigError(
        f"method is 'auto', but the other options rule out each of {', '.join(tried)}: for the first, {reasons[0]}; leave one of these "
        "options out, or name a method"
    )
