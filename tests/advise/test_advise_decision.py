"""The decision: every answer leads to a choice that works, the diagram is the tree, and figures are cited from where they stand."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

from pipeoptim.advise import Evidence, Question, Situation, advise, automatic, decide, evidence, nearest, to_mermaid
from pipeoptim.advise.decision import TREE, choices
from pipeoptim.bench.slack_model import efficiency
from pipeoptim.errors import ConfigError
from pipeoptim.methods import get_method
from pipeoptim.rules import KINDS
from pipeoptim.schedule import Program
from pipeoptim.stability import LinearStage, largest_stable_rate, linear_optimizer

ROOT = Path(__file__).parents[2]

SITUATIONS = [
    Situation(depth, m, None, "adamw", momentum, copies, exact, error, late)
    for depth, m, momentum, copies, exact, error, late in itertools.product(
        (1, 2, 8, 16), (None, 1, 3, 20), (None, 0.0, 0.5), (None, 1, 2, 9, 17), (False, True), (None, 0.5, 1.5), (None, 0.5)
    )
]


def test_every_choice_is_reached_and_works_where_it_is_reached():
    for situation in SITUATIONS[::17]:
        found = advise(situation)  # makes the program, so the method is defined here
        method = get_method(found.method)
        assert bool(found.prediction) == method.predicts
        assert found.prediction in ("", *KINDS)
        if situation.copies is not None and found.method != "1f1b" and not found.slack:
            assert found.copies <= situation.copies
        elif situation.copies is None:
            assert found.copies <= 2
        assert found.gap == 0 or not (situation.exact or situation.stages == 1)
        assert found.reasons
        assert found.cost
    assert {decide(situation)[0] for situation in SITUATIONS} == set(choices())


def test_each_question_is_answered_both_ways():
    answers = {pair for situation in SITUATIONS for pair in decide(situation)[1]}

    def questions(node):
        if isinstance(node, Question):
            yield node.text
            yield from questions(node.yes)
            yield from questions(node.no)

    assert answers == set(itertools.product(questions(TREE), (True, False)))


def walk(diagram, answers):
    """The end of the way through the drawing that ``answers``, text -> yes or no, take."""
    labels = dict(re.findall(r'^  (\w+)[\[{]"(.*)"[\]}]$', diagram, re.MULTILINE))
    arrows = {
        (start, answer): end for start, answer, end in re.findall(r"^  (\w+) -- (yes|no) --> (\w+)$", diagram, re.MULTILINE)
    }
    node = "q1"
    while node.startswith("q"):
        node = arrows[node, answers[labels[node]]]
    return labels[node]


def test_the_diagram_leads_where_the_function_leads():
    page = (ROOT / "docs/choosing.md").read_text()
    diagram = page.split("```mermaid\n")[1].split("\n```")[0]
    assert diagram == to_mermaid()
    for situation in SITUATIONS:
        choice, asked = decide(situation)
        end = walk(diagram, {text: "yes" if answer else "no" for text, answer in asked})
        assert end == choice.method + (f"<br>prediction {choice.prediction}" if choice.prediction else "")


@pytest.mark.parametrize("depth", [4, 8, 16, 32])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_kind_at_one_micro_batch_is_that_which_the_theory_calls_more_stable(depth, momentum):
    """Except where two kinds differ by less than the model is worth."""
    found = automatic(depth, 1, momentum)
    program = get_method("pipeoptim").program(depth, 1)
    optimizer = linear_optimizer("momentum" if momentum else "sgd", momentum)
    bounds = {kind: largest_stable_rate(LinearStage(program, 0, optimizer, kind)) for kind in ("none", "refined", "decayed")}
    assert bounds[found.prediction or "none"] > 0.95 * max(bounds.values())


def test_slack_follows_from_how_late_messages_are_and_says_what_it_costs():
    assert [advise(Situation(4, 4, late=late)).slack for late in (None, 0.0, 0.3, 0.5, 0.9, 2.0, 50.0)] == [0, 0, 1, 1, 2, 4, 8]
    found = advise(Situation(4, 4, late=0.3))
    assert found.gap == 2
    assert any("makes the gap 2 updates, and one from M = 6 on" in reason for reason in found.reasons)
    assert advise(Situation(4, 6, late=0.3)).gap == 1
    assert any(
        "of which it hides 4, the most that is advised" in reason for reason in advise(Situation(4, 4, late=50.0)).reasons
    )
    free = advise(Situation(4, late=2.0))  # M is chosen so that both hold
    assert (free.slack, free.microbatches, free.gap) == (4, 15, 1)
    assert (
        "M: 15, as many as the first stage forwards before its first backward, with this slack: the gap is one update."
        in free.reasons
    )
    few = advise(Situation(4, most_microbatches=4, late=2.0))
    assert (few.microbatches, few.gap) == (4, 4)
    assert "M: 4, the most that is possible." in few.reasons


@pytest.mark.parametrize("late", [0.3, 0.5, 1.0, 2.0])
def test_the_slack_that_is_advised_hides_what_it_says_and_less_does_not(late):
    found = advise(Situation(4, late=late))
    least = [efficiency(Program("async_1f1b", 4, slack=x), late, 0.0, minibatches=200) for x in (found.slack, found.slack - 1)]
    assert least[0] > 0.999 > least[1]


def test_an_exact_result_has_no_slack():
    assert advise(Situation(4, late=0.5, exact=True)).slack == 0


def test_figures_are_those_of_the_result_files():
    by_source = {}
    for row in evidence():
        assert row.loss > 0
        assert row.without >= row.synchronous
        by_source.setdefault(row.source, []).append(row)
    chars = json.loads((ROOT / "benchmarks/results/compare-chars.json").read_text())
    (eight,) = (c for c in chars["comparisons"] if (c["stages"], c["microbatches"], c["optimizer"]) == (8, 8, "adamw"))
    line = next(line for line in eight["lines"] if line["method"] == "pipeoptim")
    cited = nearest(8, 8, "adamw", "pipeoptim", chars["prediction"], by_source["chars in docs/results_short.md"])
    assert cited.loss == pytest.approx(line["val_loss"]["mean"], abs=1e-3)
    assert cited.share == pytest.approx(line["share"], abs=1e-2)
    prototypes = json.loads((ROOT / "benchmarks/results/prototypes.json").read_text())["rows"]
    assert [
        Evidence(row.source, **given) for row, given in zip(by_source[list(by_source)[-1]], prototypes, strict=True)
    ] == by_source[list(by_source)[-1]]


def test_the_nearest_figure_is_cited_and_none_is_said_to_be_unknown():
    def figure(depth, m, method="pipeoptim", seeds=1):
        return Evidence("here", depth, m, "adamw", method, "paper", seeds, 2.0, 1.0, 3.0)

    rows = [figure(4, 1), figure(8, 1), figure(8, 8), figure(8, 8, seeds=3), figure(8, 8, "pipeoptim_stash", 5)]
    assert nearest(16, 1, "AdamW", "pipeoptim", "refined", rows) is rows[1]
    assert nearest(6, 7, "torch.optim:AdamW", "pipeoptim", "displacement", rows) is rows[3]
    assert nearest(8, 9, "adam", "pipeoptim_stash", "paper", rows) is rows[4]
    assert nearest(4, 1, "adamw", "pipeoptim_stash", "refined", rows) is rows[0]  # the other backward, rather than nothing
    assert nearest(4, 1, "adamw", "pipeoptim", "in_progress", rows) is None
    assert nearest(4, 2, "adamw", "pipeoptim", "refined", rows) is None
    assert nearest(4, 1, "lion", "pipeoptim", "refined", rows) is None
    assert "50% of the gap closed (pipeoptim paper, D = 4, M = 1, adamw, one seed; here)" in rows[0].describe()
    assert advise(Situation(8, optimizer="lion")).cost.startswith("unknown")


@pytest.mark.parametrize(
    "wrong",
    [
        {"stages": 0},
        {"stages": True},
        {"microbatches": 1.5},
        {"copies": 0},
        {"momentum": 1.0},
        {"late": -1.0},
        {"late": float("nan")},
    ],
)
def test_what_makes_no_sense_is_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Situation(**{"stages": 4, **wrong})
