"""Evaluation: parts of its own, and means over whole sets that every process gets; and processes that are fed unequally."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import evaluation_cases as cases
import pipeoptim as po

HERE = Path(__file__).parent


def accuracy(output, target):
    return cross_entropy(output, target), {"accuracy": (output.argmax(1) == target).double().mean()}


@pytest.mark.parametrize("method", ["pipeoptim", "1f1b", "naive"])
@pytest.mark.parametrize("drain", [True, False])
def test_the_parts_of_an_evaluated_batch_are_its_own_and_training_goes_on_with_its_own(method, drain):
    torch.manual_seed(0)

    class Sparse(nn.Linear):
        def forward(self, x):
            x = super().forward(x)
            po.add_loss("sparse", x.abs().mean())
            return x

    stages = [Sparse(4, 8), nn.Linear(8, 3)]
    pipe = po.Emulator(stages, cases.sgd, accuracy, method, 2)
    for _ in range(4):
        x, y = torch.randn(8, 4), torch.randint(3, (8,))
        pipe.step(x, target=y)
        trained = pipe.loss_parts
    assert trained.keys() == {"accuracy", "sparse"}
    with torch.no_grad():
        right = stages[1](stages[0](x)).argmax(1)
    pipe.eval_step(x, target=right, drain=drain)
    if not drain:  # stages of different versions; after a drain the labels would be others
        assert pipe.loss_parts == {"accuracy": 1.0}
    pipe.drain()
    with torch.no_grad():
        right = stages[1](stages[0](x)).argmax(1)
    pipe.eval_step(x, target=right)
    assert pipe.loss_parts == {"accuracy": 1.0}
    pipe.eval_step(x, target=(right + 1) % 3)
    assert pipe.loss_parts == {"accuracy": 0.0}
    losses = []
    pipe.step(x, target=y, losses=losses)
    assert pipe.loss_parts.keys() == {"accuracy", "sparse"}


def emulator(depth, processes=None, method="pipeoptim"):
    return lambda options: po.Emulator(cases.stages(depth), cases.sgd, cases.loss_fn, method, processes=processes, **options)


@pytest.mark.parametrize("name", cases.CASES)
def test_a_whole_evaluation_is_that_of_all_rows_in_one_piece(name):
    options, sizes, scaled = cases.CASES[name]
    pipe = emulator(3, method="1f1b")(options)
    cases.train(pipe)
    found = pipe.evaluate(cases.batches(sizes, scaled=scaled))
    expected = cases.plain(name, 3)
    assert (found.batches, found.parts.keys()) == (len(sizes), {"worst", "share"})
    for part, value in {"loss": found.loss, "weight": found.weight, **found.parts}.items():
        assert value == pytest.approx(expected[part], rel=1e-12), part


def test_batches_may_be_calls_of_any_form_and_rows_be_in_anything():
    class Two(nn.Module):
        def forward(self, a, b=None):
            return torch.stack([torch.as_tensor(row) for row in a]) + (0 if b is None else b)

    pipe = po.Emulator(
        [Two(), nn.Identity()], [None, None], lambda out, y: out.mean() if y is None else (out - y).mean(), "1f1b"
    )
    one = torch.ones(3, 1)
    given = [
        ((one, one), torch.zeros(3, 1)),
        [one, None],
        ({"a": one, "b": 2 * one}, None),
        ([torch.full((1,), 9.0)], None),
        ((po.MicroBatches([one]),), None, {0: {"b": po.Whole(4.0)}}),
    ]
    found = pipe.evaluate(iter(given))
    assert found.weight == 13
    assert found.loss == pytest.approx((3 * 2 + 3 * 1 + 3 * 3 + 1 * 9 + 3 * 5) / 13)


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([torch.ones(2, 3)], r"evaluate was given a Tensor as a batch, must be \(inputs, target\)"),
        ([(torch.ones(2, 3),)], r"evaluate was given a tuple of 1 as a batch"),
        ([], "evaluate was given 0 batches that count"),
        (None, "evaluate was given a NoneType, must be an iterable of batches"),
    ],
)
def test_what_is_no_batch_is_told(batches, words):
    with pytest.raises(po.ConfigError, match=words):
        emulator(2)({}).evaluate(batches)


def wide(rows):
    return torch.ones(6, rows, 2)


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        # Sequences with the time first: six "rows" each, however many samples there are.
        (
            [(wide(4), torch.ones(4)), (wide(3), torch.ones(3))],
            "batch 2 .* has 6 rows of inputs and 3 of the target, .* had 6 and 4",
        ),
        ([({"a": wide(4), "b": torch.ones(3)}, None)], "inputs of batch 1 .* have 3 and 6 rows"),
        ([(torch.ones(4, 1), None), (2.0, None)], "batch 2 of the evaluation has none that can be counted, but those before"),
    ],
)
def test_rows_that_are_not_clear_are_told(batches, words):
    class Mean(nn.Module):
        def forward(self, a, b=None):
            return torch.as_tensor(a).mean()

    pipe = po.Emulator([Mean()], [None], lambda out, y: out, "1f1b")
    with pytest.raises(po.ConfigError, match=words):
        pipe.evaluate(batches)


def test_marks_and_flattened_targets_are_counted_right():
    pipe = po.Emulator([nn.Identity()], [None], lambda out, y: out.mean(), "1f1b")
    sizes, values = (4, 4, 1), (1.0, 2.0, 9.0)
    along = [(po.Along(value * wide(n), 1), torch.ones(n)) for n, value in zip(sizes, values, strict=True)]
    flat = [(value * torch.ones(n, 5), torch.ones(5 * n)) for n, value in zip(sizes, values, strict=True)]
    for batches in (along, flat):
        assert pipe.evaluate(batches).loss == pytest.approx((4 + 8 + 9) / 9)


@pytest.mark.parametrize("weight", ["many", torch.ones(2), -1, float("nan"), float("inf")])
def test_a_loss_weight_that_is_none_is_refused(weight):
    x, y = torch.ones(4, 3, dtype=torch.float64), torch.ones(4, 3, dtype=torch.float64)
    pipe = po.Emulator(cases.stages(2), cases.sgd, cases.loss_fn, "1f1b", 2, loss_weight=lambda target: weight)
    for call in (lambda: pipe.evaluate([(x, y)]), lambda: pipe.step(x, target=y)):
        with pytest.raises(po.ConfigError, match="loss_weight returned .*, must be a "):
            call()
    assert pipe.version(0) == 0


def test_a_loss_that_is_not_finite_is_not_hidden():
    pipe = po.Emulator([nn.Identity()], [None], lambda out, y: out.mean() * math.inf, "1f1b")
    assert pipe.evaluate([(torch.ones(2, 1), None)]).loss == math.inf
