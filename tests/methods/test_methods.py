"""What the tables of the methods say, against the design's own table; and how a user's method gets in."""

from dataclasses import dataclass, replace

import pytest
import torch

import pipeoptim as po
from pipeoptim.methods import Method, copies, gap, registry
from pipeoptim.methods.average_predictors import SmoothedGradient
from pipeoptim.weights import Latest, Predicted, Source, Stashed

DEPTH = 8


@pytest.mark.parametrize("name", sorted(po.METHODS))
def test_every_method_says_what_it_is_and_where_it_comes_from(name):
    method = po.METHODS[name]
    assert method.name == name
    assert method.summary
    assert method.source
    assert method.program(DEPTH, DEPTH).depth == DEPTH


@pytest.mark.parametrize("name", sorted(po.METHODS))
def test_every_method_has_formula_source_and_deviations(name):
    """In the file that defines it, whose docstring is what ``pipeoptim methods NAME`` shows."""
    explanation = registry.EXPLANATIONS[name.split("+")[0]]
    assert "W" in explanation and "``" in explanation, "no formula"
    assert po.METHODS[name].deviations, "say None. where there are none"


@pytest.mark.parametrize(
    ("name", "m", "expected"),
    [
        ("gpipe", 1, lambda k: 1),
        ("1f1b", 4, lambda k: 1),
        ("naive", 1, lambda k: 1),
        ("pipedream", 1, lambda k: DEPTH - k),
        ("pipedream_2bw", 8, lambda k: 2),
        ("spectrain", 1, lambda k: 2),
        ("xpipe", 8, lambda k: 3 if 2 <= k < 7 else 2),  # s_b is 0 on the first two, and F and B agree on the last
        ("nesterov", 1, lambda k: DEPTH - k),
        ("pipeoptim", 1, lambda k: 2 if k < DEPTH - 1 else 1),
        ("pipeoptim", 8, lambda k: 2 if k < DEPTH - 1 else 1),
        ("pipeoptim_stash", 1, lambda k: DEPTH - k + 1 if k < DEPTH - 1 else 1),
        ("pipedream+vertical_sync", 1, lambda k: DEPTH),
    ],
)
def test_copies_of_the_weights_are_those_of_the_design(name, m, expected):
    assert [copies(po.METHODS[name], DEPTH, m, k) for k in range(DEPTH)] == [expected(k) for k in range(DEPTH)]


def test_copies_with_predictions_from_the_mini_batch_in_progress_are_those_of_the_design():
    pipeoptim, stash = po.METHODS["pipeoptim"], po.METHODS["pipeoptim_stash"]
    settings = [(m, refresh) for m in (1, 3, 8, 16) for refresh in (1, 2, m)]
    assert {copies(pipeoptim, DEPTH, m, k, refresh=r) for m, r in settings for k in range(DEPTH - 1)} == {2}
    for m, r, expected in ((8, 8, 3), (14, 14, 2), (8, 1, DEPTH), (1, 1, DEPTH + 1)):  # of stage 0
        assert copies(stash, DEPTH, m, 0, refresh=r) == expected


def test_gaps_are_those_of_the_design():
    assert [gap(po.METHODS["pipeoptim"], DEPTH, 1, k) for k in range(DEPTH)] == [7, 6, 5, 4, 3, 2, 1, 0]
    assert [gap(po.METHODS["pipeoptim"], DEPTH, 8, k) for k in range(DEPTH)] == [1] * 7 + [0]
    assert [gap(po.METHODS["gpipe"], DEPTH, 8, k) for k in range(DEPTH)] == [0] * 8
    assert [gap(po.METHODS["pipedream_2bw"], DEPTH, 8, k) for k in range(DEPTH)] == [1] * 8
    assert [gap(po.METHODS["pipedream+vertical_sync"], DEPTH, 1, k) for k in range(DEPTH)] == [7] * 8


def test_spectrain_and_xpipe_predict_as_far_as_their_papers_say():
    spectrain, xpipe = po.METHODS["spectrain"], po.METHODS["xpipe"]
    one, four = spectrain.program(4, 1), xpipe.program(4, 4)
    assert [spectrain.forward.steps_ahead(one, k, 9) for k in range(4)] == [3, 2, 2, 1]
    assert [spectrain.backward.steps_ahead(one, k, 9) for k in range(4)] == [0, 0, 1, 1]
    assert [xpipe.forward.steps_ahead(four, k, 8) for k in range(4)] == [2, 1, 1, 1]  # round of 1.5, 1.375, 1.25, 1.125
    assert [xpipe.backward.steps_ahead(four, k, 8) for k in range(4)] == [0, 0, 1, 1]


def test_a_method_of_ones_own_gets_in_by_name_once():
    mine = Method("mine", order="async_1f1b", forward=Latest(), backward=Stashed(), summary="as PipeDream")
    try:
        assert po.register_method(mine) is mine
        assert po.get_method("mine") is mine
        assert po.register_method(mine) is mine
        with pytest.raises(po.ConfigError, match="exists already"):
            po.register_method(replace(mine, summary="another"))
    finally:
        del registry._methods["mine"]


def test_a_method_in_a_file_of_ones_own(tmp_path, monkeypatch):
    file = tmp_path / "mine.py"
    file.write_text(
        "from pipeoptim.methods import Method\nfrom pipeoptim.weights import Latest\n"
        "METHOD = Method('mine', order='gpipe', forward=Latest(), backward=Latest(), summary='as GPipe')\nOTHER = 3\n"
    )
    assert po.get_method(f"{file}:METHOD").name == "mine"
    monkeypatch.syspath_prepend(tmp_path)
    assert po.get_method("mine:METHOD").order == "gpipe"
    for text, words in (
        (f"{file}:OTHER", "is a int, must be a pipeoptim.Method"),
        (f"{file}:NONE", "write module:NAME or file.py:NAME"),
        (f"{tmp_path}/absent.py:METHOD", "cannot be loaded"),
        ("no.such.module:METHOD", "cannot be loaded"),
        ("nesterov(stash='no')", "stash is 'no', must be True or False"),
    ):
        with pytest.raises(po.ConfigError, match=words):
            po.get_method(text)


def test_options_of_a_method():
    assert po.get_method("pipemare(anneal_updates=0, correct=False)").lr_scale is None
    assert po.get_method("pipedream(vertical_sync=True)") == po.METHODS["pipedream+vertical_sync"]
    assert po.get_method("nesterov(stash=False)") == po.METHODS["nesterov+no_stash"]
    assert po.get_method("nesterov(anneal_updates=70)").name == "nesterov+T1"
    for name in registry.FACTORIES:  # without options it is the method itself, whose parts may be made anew
        assert po.get_method(f"{name}()").name == name
    for text, words in (
        ("pipemare(1)", "cannot be read"),
        ("pipemare(x=", "cannot be read"),
        ("pipemare(speed=3)", "unknown pipemare option 'speed'"),
        ("gpipe(x=1)", "has no options"),
        ("pipemarre(x=1)", "did you mean 'pipemare'"),
    ):
        with pytest.raises(po.ConfigError, match=words):
            po.get_method(text)


def test_tables_that_cannot_work_are_refused():
    with pytest.raises(po.ConfigError, match="known orders: async_1f1b"):
        Method("mine", order="2f2b", forward=Latest(), backward=Latest(), summary="")
    with pytest.raises(po.ConfigError, match="stashed forward"):
        Method("mine", order="gpipe", forward=Stashed(), backward=Latest(), summary="")
    with pytest.raises(po.ConfigError, match="depth is 8; set microbatches to 8"):
        po.METHODS["pipedream_2bw"].program(8, 4)


def test_a_methods_own_predictor_is_told_what_it_works_for():
    seen = []

    def predictor(context):
        seen.append(context)
        return SmoothedGradient(context)

    mine = Method("mine", "async_1f1b", Predicted(), Latest(), summary="for the test", predictor=predictor)
    stages = [torch.nn.Linear(3, 3) for _ in range(3)]
    optimizers = [torch.optim.SGD(stage.parameters(), lr=0.1) for stage in stages]
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 5) for optimizer in optimizers]
    pipe = po.Emulator(
        stages, optimizers, torch.nn.functional.mse_loss, mine, 2, schedulers=schedulers, prediction="paper", monitor=1
    )
    assert [context.stage for context in seen] == [0, 1]  # the last stage predicts nothing
    for k, context in enumerate(seen):
        assert context.optimizer is optimizers[k] and context.scheduler is schedulers[k]
        assert (context.program.depth, context.program.microbatches, context.kind) == (3, 2, "paper")
    for _ in range(6):
        pipe.step(torch.randn(4, 3), target=torch.randn(4, 3))
    assert seen[0].monitor is not None and len(seen[0].monitor.figures()) == len(pipe.prediction_error(0)) == 1


@dataclass(frozen=True)
class EverySecond(Source):
    """Forwards on the newest even version, whatever has come since: nothing in the library knows this source."""

    def acquire(self, weights, i):
        return weights.numbered(weights.version - (weights.version - weights.restart) % 2)

    def oldest_needed(self, weights, i):
        return weights.version - (weights.version - weights.restart) % 2


@dataclass(frozen=True)
class TwoWays(Source):
    """Predicts by hand, twice per forward: a second prediction is in use while the first one is."""

    predicts = True

    def acquire(self, weights, i):
        further = weights.predicted(3)
        chosen = weights.predicted(self.steps_ahead(weights.program, weights.k, i))
        weights.release(further)
        return chosen

    def steps_ahead(self, program, k, i):
        return program.gap(k, i)


@dataclass(frozen=True)
class LikeStashed(Source):
    """A backward on the forward's weights by another name."""

    reuses_forward = True


@pytest.mark.parametrize(
    ("forward", "backward", "m"),
    [
        (EverySecond(), Latest(), 1),
        (EverySecond(), Stashed(), 1),
        (TwoWays(), Latest(), 1),
        (TwoWays(), Stashed(), 2),
        (Latest(), LikeStashed(), 1),
    ],
)
def test_copies_of_a_users_own_source_are_those_that_the_engine_makes(forward, backward, m):
    method = Method("own", "async_1f1b", forward, backward, summary="for the test")
    torch.manual_seed(0)
    stages = [torch.nn.Linear(4, 4) for _ in range(4)]
    pipe = po.Emulator(stages, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), torch.nn.functional.mse_loss, method, m)
    most = [0] * 4
    for _ in range(12):
        pipe.step(torch.randn(4, 4), target=torch.randn(4, 4))
        most = [max(most[k], pipe.weight_bytes(k)) for k in range(4)]
    assert [pipe.weight_copies(k) for k in range(4)] == [n // (4 * 20) for n in most]
    assert pipe.weight_copies(0) > 2


def test_the_gap_of_a_users_own_source_is_counted():
    method = Method("own", "async_1f1b", EverySecond(), Latest(), summary="for the test")
    assert [gap(method, 3, 1, 0, 0), gap(method, 3, 1, 2, 0)] == [2, 0]
