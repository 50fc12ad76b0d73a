"""The decision between methods, as a tree of questions: walked by `advise` and by ``method="auto"``, drawn in docs/choosing.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipeoptim.advise.situation import Situation


@dataclass(frozen=True)
class Choice:
    """A leaf: what to use.

    Args:
        method: its name.
        prediction: kind; empty where the method predicts nothing.
        because: why, as a sentence.
    """

    method: str
    prediction: str
    because: str


@dataclass(frozen=True)
class Question:
    """A fork.

    Args:
        text: the question.
        ask: its answer in a situation.
        yes, no: what comes next.
    """

    text: str
    ask: Callable[[Situation], bool]
    yes: Question | Choice
    no: Question | Choice


USUAL_MOMENTUM = 0.9
"""Where none is known."""


def _momentum(situation: Situation) -> float:
    return USUAL_MOMENTUM if situation.momentum is None else situation.momentum


_SYNCHRONOUS = Choice(
    "1f1b",
    "",
    "It is synchronous, with one copy of the weights; the flush costs (D-1)/(M+D-1) of the time, less with a larger M.",
)

_WITHOUT_PREDICTION = Question(
    "Is there room for D copies of the weights?",
    lambda s: s.has_room(s.stages, unknown=False),
    yes=Choice("pipedream", "", "Without a prediction, B on the weights of F makes every gradient that of one point."),
    no=Choice("naive", "", "Without a prediction and without room for stashed weights, F and B use the latest ones."),
)

_ONE_BATCH = Question(
    "Does the optimizer have momentum?",
    lambda s: _momentum(s) > 0,
    yes=Question(
        "Is the gap of D-1 larger than 1 / (1 - momentum)?",
        lambda s: s.stages - 1 > 1 / (1 - _momentum(s)),
        yes=Choice(
            "pipeoptim", "decayed", "So far ahead a momentum that decays is a safer estimate than the last step repeated."
        ),
        no=Question(
            "Is there room for D+1 copies of the weights?",
            lambda s: s.has_room(s.stages + 1, unknown=False),
            yes=Choice(
                "pipeoptim_stash", "refined", "Every mini-batch is an update; predicted weights that B uses as well lose least."
            ),
            no=Choice("pipeoptim", "refined", "Every mini-batch is an update; the prediction takes two copies of the weights."),
        ),
    ),
    no=_WITHOUT_PREDICTION,
)

TREE = Question(
    "Is there one stage only, or must the result equal synchronous training?",
    lambda s: s.stages == 1 or s.exact,
    yes=_SYNCHRONOUS,
    no=Question(
        "Is there room for two copies of the weights?",
        lambda s: s.has_room(2, unknown=True),
        yes=Question(
            "Did a measured run find that predictions err more than none?",
            lambda s: s.relative_error is not None and s.relative_error > 1,
            yes=_WITHOUT_PREDICTION,
            no=Question(
                "Is M at least D?",
                lambda s: s.m >= s.stages,
                yes=Choice(
                    "pipeoptim",
                    "in_progress",
                    "The gap is one update (without slack), of which a stage has seen a part when it predicts it; two copies suffice.",
                ),
                no=Question(
                    "Is M more than 1?",
                    lambda s: s.m > 1,
                    yes=Choice(
                        "pipeoptim",
                        "in_progress",
                        "The gap is several updates; of the next one a stage knows a part. M = D would make the gap one update.",
                    ),
                    no=_ONE_BATCH,
                ),
            ),
        ),
        no=_SYNCHRONOUS,
    ),
)
"""Asked from the top. What is not known counts as in the lambdas: room for two copies there is, for more there is not."""


IF_REFUSED = (
    Choice("pipeoptim", "refined", "It predicts, with two copies of the weights."),
    Choice("pipeoptim", "in_progress", "It predicts from the mini-batch in progress, with two copies of the weights."),
    Choice("naive", "", "It predicts nothing, and takes one copy of the weights."),
    _SYNCHRONOUS,
)
"""What is tried in turn where other options of the user rule the choice of the tree out: none takes more than two copies of the weights."""


def decide(situation: Situation) -> tuple[Choice, list[tuple[str, bool]]]:
    """The choice, and the questions with their answers that led to it.

    Example:
        >>> choice, asked = decide(Situation(stages=8, microbatches=8))
        >>> choice.method, choice.prediction, asked[-1]
        ('pipeoptim', 'in_progress', ('Is M at least D?', True))
    """
    node: Question | Choice = TREE
    asked = []
    while isinstance(node, Question):
        answer = node.ask(situation)
        asked.append((node.text, answer))
        node = node.yes if answer else node.no
    return node, asked


def choices(node: Question | Choice = TREE) -> Iterator[Choice]:
    """All leaves, each once for every way to it."""
    if isinstance(node, Choice):
        yield node
    else:
        yield from choices(node.yes)
        yield from choices(node.no)
