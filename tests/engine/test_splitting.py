"""Inputs and targets in every container: whatever holds the rows, splitting them leaves the gradient of the whole batch."""

import copy
from collections import UserDict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import pipeoptim as po
import split_cases as cases

HERE = Path(__file__).parent
mse = nn.functional.mse_loss
names = st.sampled_from(sorted(cases.CONTAINERS))


def plain_step(stages, x, y, first=None, second=None):
    """One step of plain training on tensors: loss, and the weights after it."""
    stages = copy.deepcopy(stages)
    optimizer = cases.sgd([p for stage in stages for p in stage.parameters()])
    loss = mse(stages[1](stages[0](x, gate=first), gate=second), y)
    loss.backward()
    optimizer.step()
    return loss.detach(), [p.detach() for stage in stages for p in stage.parameters()]


def weights(stages):
    return [p.detach() for stage in stages for p in stage.parameters()]


@settings(max_examples=150)
@given(
    rows=st.integers(1, 9),
    m=st.integers(1, 5),
    uneven=st.booleans(),
    method=st.sampled_from(["gpipe", "1f1b"]),
    container=st.tuples(names, names, names, names),
)
def test_the_gradient_is_that_of_the_batch_in_one_piece(rows, m, uneven, method, container):
    rows = rows if uneven else rows * m
    assume("tuple" not in container or rows != 2)  # could be either, and is refused
    dense = [cases.numbers(rows, seed) for seed in range(4)]
    x, y, first, second = (cases.CONTAINERS[name](value) for name, value in zip(container, dense, strict=True))
    stages = cases.stages()
    loss, expected = plain_step(stages, *dense)
    pipe = po.Emulator(stages, cases.sgd, cases.loss_fn, method, m, uneven=uneven)
    got = pipe.step(x, target=y, gate=first, stage_kwargs={1: {"gate": second}})
    torch.testing.assert_close(got, loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(weights(stages), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", cases.CONTAINERS)
@pytest.mark.parametrize("method", ["pipeoptim", "pipedream"])
def test_an_asynchronous_pipeline_computes_with_a_container_what_it_computes_with_a_tensor(name, method):
    trained = []
    for make in (cases.CONTAINERS["tensor"], cases.CONTAINERS[name]):
        stages = cases.stages(3)
        pipe = po.Emulator(stages, cases.sgd, cases.loss_fn, method, 2, uneven=True)
        losses = [pipe.step(make(cases.numbers(n, n)), target=make(cases.numbers(n, -n - 1))) for n in (6, 5, 8, 3, 4)]
        losses.append(pipe.eval_step(make(cases.numbers(4, 4)), target=make(cases.numbers(4, 5))))
        trained.append([*losses, *weights(stages)])
    assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(cases.WIDTH, cases.WIDTH, dtype=torch.float64)

    def forward(self, x, state):
        return self.lstm(x, state)[0]


@settings(max_examples=30)
@given(batch=st.integers(1, 6), length=st.integers(1, 6), m=st.integers(1, 4))
def test_time_major_sequences_are_cut_along_their_batch_dimension(batch, length, m):
    torch.manual_seed(0)
    stages = [Recurrent(), nn.Linear(cases.WIDTH, 2, dtype=torch.float64)]
    plain = copy.deepcopy(stages)
    x = torch.randn(length, batch, cases.WIDTH, dtype=torch.float64)
    state = tuple(torch.randn(1, batch, cases.WIDTH, dtype=torch.float64) for _ in "hc")
    y = torch.randn(length, batch, 2, dtype=torch.float64)
    pipe = po.Emulator(stages, cases.sgd, mse, "1f1b", m, uneven=True)
    loss = pipe.step(po.Along(x, 1), po.Along(state, dim=-2), target=po.Along(y, 1))
    expected = mse(plain[1](plain[0](x, state)), y)
    expected.backward()
    cases.sgd([p for stage in plain for p in stage.parameters()]).step()
    torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(weights(stages), weights(plain), rtol=0, atol=1e-12)


@settings(max_examples=30)
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4), name=names)
def test_micro_batches_that_the_user_split_count_by_their_rows(sizes, name):
    m, make = len(sizes), cases.CONTAINERS[name]
    x, y = cases.numbers(sum(sizes), 1), cases.numbers(sum(sizes), 2)
    stages = cases.stages()
    loss, expected = plain_step(stages, x, y)
    pipe = po.Emulator(stages, cases.sgd, cases.loss_fn, "1f1b", m, uneven=len(set(sizes)) > 1)
    given_x, given_y = (po.MicroBatches([make(part) for part in value.split(sizes)]) for value in (x, y))
    torch.testing.assert_close(pipe.step(given_x, target=given_y), loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(weights(stages), expected, rtol=0, atol=1e-12)


def test_micro_batches_without_a_number_of_rows_count_alike():
    """A packed sequence: offsets say where each sample begins, so nothing has one row per sample."""
    stages = [PackedMean(), nn.Linear(cases.WIDTH, 2, dtype=torch.float64)]
    packed = [{"tokens": cases.numbers(n, n), "offsets": torch.tensor([0, n // 2, n])} for n in (6, 9)]
    losses = []
    pipe = po.Emulator(stages, cases.sgd, lambda output, target: output.square().mean(), "1f1b", 2)
    loss = pipe.step(po.MicroBatches(packed), losses=losses)
    torch.testing.assert_close(loss, (losses[0] + losses[1]) / 2, rtol=0, atol=1e-12)


class PackedMean(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(cases.WIDTH, dtype=torch.float64))

    def forward(self, packed):
        bounds = packed["offsets"].tolist()
        return torch.stack([packed["tokens"][a:b].mean(0) for a, b in pairwise(bounds)]) * self.scale


def test_a_weight_of_the_loss_is_asked_of_lists_too_but_not_of_empty_ones():
    stages = cases.stages()
    x = cases.numbers(2, 0)
    pipe = po.Emulator(
        stages, cases.sgd, cases.loss_fn, "1f1b", 3, uneven=True, loss_weight=lambda rows: len(rows) * len(rows[0])
    )
    loss, expected = plain_step(stages, x, x)
    torch.testing.assert_close(pipe.step(x, target=x.tolist()), loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(weights(stages), expected, rtol=0, atol=1e-12)


x = cases.numbers(4, 0)


@pytest.mark.parametrize(
    ("words", "args", "kwargs"),
    [
        (r"keyword 'gate' of stage 0 have 4 and 3 rows.*of a list, each entry is a row", (x,), {"gate": list(x[:3])}),
        ("2 of the 4 rows of the input, but 1 of 2 of the target", (x,), {"target": ["a", "b"]}),
        ("2 of the 4 rows of the input, but 4 of 8 of the target.*flatten it", (x,), {"target": torch.cat([x, x])}),
        ("2 of the 4 rows of the input, but 1 of 2 of the target; .*of a list", (x,), {"target": [x, x]}),
        ("2 of the 4 rows of the input, but 0 of 0", (x,), {"target": []}),
        ("input 0 holds a set, whose rows are unknown.*pipeoptim.Whole", ({1, 2, 3, 4},), {}),
        (r"input 0 holds a UserDict, .* give dict\(...\) of it, or", (UserDict(x=x),), {}),
        ("the target holds a dict_values", (x,), {"target": dict.fromkeys("abcd").values()}),
        ("holds a tensor of layout torch.sparse_coo", (x.to_sparse(),), {}),
        ("holds a tensor of layout torch.jagged", (torch.nested.nested_tensor(list(x), layout=torch.jagged),), {}),
        ("holds a tensor of layout torch.strided", (torch.nested.nested_tensor(list(x)),), {}),
        ("NumPy array of object, which cannot become a tensor", (x,), {"target": np.array([{}, {}, {}, {}])}),
        ("NumPy array of float64.*has no mask", (x,), {"target": np.ma.masked_array(np.ones((4, 3)), True)}),
        ("tuple of 4 tensors of 4 rows each.*give a list for one per row, a dict", (x,), {"target": (x, x, x, x)}),
        ("has no dimension 3, its shape is", (po.Along(x, 3),), {}),
        ("have 4 and 3 rows", (po.Along((x, x.T), 0),), {}),
        ("MicroBatches of input 0 has 3 entries, must have one for each micro-batch, which is 2",
         (po.MicroBatches([x, x, x]),), {}),
        (r"a batch of 7, which cannot be split into 2 equal.*uneven=True", (po.MicroBatches([x, x[:3]]),), {}),
        (r"have 3\+1 and 2\+2 rows", (po.MicroBatches([x[:3], x[3:]]),), {"gate": x}),
        ("the inputs have no rows", ([],), {}),
    ],
)  # fmt: skip
def test_what_cannot_be_split_is_refused_before_anything_is_computed(words, args, kwargs):
    pipe = po.Emulator(cases.stages(), cases.sgd, cases.loss_fn, "1f1b", 2)
    with pytest.raises(po.ConfigError, match=words) as told:
        pipe.step(*args, **kwargs)
    assert "\n" not in str(told.value)
    assert pipe.version(0) == 0


@pytest.mark.parametrize(
    ("mark", "words"),
    [
        (lambda: po.Along(x, None), "dim of pipeoptim.Along is None, must be an integer"),
        (lambda: po.MicroBatches(x), "MicroBatches was given a Tensor, must be given a list"),
        (lambda: po.MicroBatches([]), "MicroBatches was given no entry"),
    ],
)
def test_marks_check_what_they_are_given(mark, words):
    with pytest.raises(po.ConfigError, match=words):
        mark()


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_fed_in_one_piece(layout):
    class Padded(nn.Linear):
        def forward(self, nested):
            return super().forward(torch.nested.to_padded_tensor(nested, 0.0)).sum(1)

    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(5, 3)], layout=layout)
    pipe = po.Emulator([Padded(3, 3)], lambda p: torch.optim.SGD(p, lr=0.001), nn.functional.mse_loss, "1f1b")
    losses = [pipe.step(nested, target=torch.zeros(2, 3)) for _ in range(3)]
    assert losses[2] < losses[0] and pipe.evaluate([(nested, torch.zeros(2, 3))]).weight == 2


def test_structure_and_constants_keep_their_meaning():
    seen = []

    class Note(nn.Linear):
        def forward(self, x, **kwargs):
            seen.append(kwargs)
            return super().forward(x)

    given_kwargs = {
        "mode": "train", "scale": 2.0, "pair": (x, None, "text"), "of": {"x": x, "type": torch.float32},
        "size": po.Whole((7, 7)), "masks": [po.Whole(x[:1]), po.Whole(x[:3])], "call": len, "none": None,
    }  # fmt: skip
    note = Note(3, 3, dtype=torch.float64)
    po.Emulator([note], cases.sgd, mse, "1f1b", 2).step(x, target=x, **given_kwargs)
    for half, kwargs in zip(x.split(2), seen, strict=True):
        assert (kwargs["mode"], kwargs["scale"], kwargs["size"], kwargs["call"]) == ("train", 2.0, (7, 7), len)
        assert kwargs["none"] is None
        assert kwargs["of"]["type"] is torch.float32
        assert kwargs["pair"][1:] == (None, "text")
        assert torch.equal(kwargs["pair"][0], half)
        assert torch.equal(kwargs["of"]["x"], half)
        assert [len(mask) for mask in kwargs["masks"]] == [1, 3]


def test_a_sample_for_partition_is_split_as_training_splits_it():
    stages = nn.Sequential(cases.Reader(), cases.Gate(), cases.Gate())
    cut = po.partition(stages, 2, (cases.boxes(cases.numbers(6, 0)),), microbatches=3)
    assert len(cut.stages) == 2
