"""What goes into a pipeline: batches of any size, keywords for any stage, inputs that are not sliced. Each against an oracle."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import oracle
import pipeoptim as po
from test_oracle import WIDTH, Layer, uses

mse = nn.functional.mse_loss


def sgd(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def train_plain(model, batches, loss_fn=mse):
    """Plain training on whole batches: what every flushing pipeline must equal."""
    optimizer = sgd(model.parameters())
    losses = []
    for x, y in batches:
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def assert_close(a, b):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["gpipe", "1f1b"])
@pytest.mark.parametrize("m", [2, 3, 4])
def test_a_batch_that_m_does_not_divide_has_the_gradient_of_the_whole_batch(method, m):
    torch.manual_seed(0)
    stages = [Layer() for _ in range(3)]
    plain = copy.deepcopy(nn.Sequential(*stages))
    batches = [(double(rows, WIDTH), double(rows, WIDTH)) for rows in (8, 5, 1, 7, 12, 3)]
    pipe = po.Emulator(stages, sgd, mse, method, m, uneven=True)
    losses = [pipe.step(x, target=y) for x, y in batches]
    torch.testing.assert_close(losses, train_plain(plain, batches), rtol=0, atol=1e-12)
    assert_close(nn.Sequential(*stages), plain)


@pytest.mark.parametrize("method", ["naive", "pipedream", "pipeoptim", "pipeoptim_stash"])
@settings(max_examples=15)
@given(depth=st.integers(1, 5), m=st.integers(1, 5), rows=st.lists(st.integers(1, 9), min_size=4, max_size=12))
def test_asynchronous_training_on_batches_of_changing_size_equals_the_oracle(method, depth, m, rows):
    torch.manual_seed(1)
    rule = oracle.Rule("momentum")
    stages = [Layer() for _ in range(depth)]
    initial = [[p.detach().clone() for p in s.parameters()] for s in stages]
    batches = [(double(n, WIDTH), double(n, WIDTH)) for n in rows]
    pipe = po.Emulator(stages, rule.torch, mse, method, m, uneven=True)
    losses = [pipe.step(x, target=y).item() for x, y in batches]
    pipe.drain()
    expected, expected_losses = oracle.train(initial, rule, [len(rows)], batches, m, *uses(method, rule))
    assert losses == pytest.approx(expected_losses, abs=1e-10, rel=0)
    for stage, other in zip(stages, expected, strict=True):
        for p, w in zip(stage.parameters(), other.weights[-1], strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=0, atol=1e-10)


def test_a_mean_over_tokens_that_are_not_padding_counts_them_and_not_the_rows():
    """Gradient accumulation that averages means of unequal counts is a known bug of training loops; here is the way out."""

    def loss_fn(output, target):
        return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten(), ignore_index=-100)

    torch.manual_seed(0)
    stages = [nn.Embedding(11, 5), nn.Linear(5, 11)]
    plain = copy.deepcopy(nn.Sequential(*stages))
    g = torch.Generator().manual_seed(2)
    batches = []
    for rows in (6, 6, 5):
        y = torch.randint(11, (rows, 7), generator=g)
        y[torch.arange(7) >= torch.randint(1, 8, (rows, 1), generator=g)] = -100
        y[-1] = -100  # the last micro-batch has nothing to learn from: its mean is NaN
        batches.append((torch.randint(11, (rows, 7), generator=g), y))
    pipe = po.Emulator(stages, sgd, loss_fn, "1f1b", 5, uneven=True, loss_weight=lambda target: (target != -100).sum())
    losses = [pipe.step(x, target=y) for x, y in batches]
    torch.testing.assert_close(losses, train_plain(plain, batches, loss_fn), rtol=1e-6, atol=1e-6)
    for p, q in zip(nn.Sequential(*stages).parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


class Gated(nn.Module):
    """A stage with a keyword that is sliced, one that is not, and one that is no tensor."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    def forward(self, x, *, gate=None, table=None, power=1):
        x = torch.tanh(self.linear(x))
        if table is not None:
            x = x @ table
        return x if gate is None else x * gate**power


@pytest.mark.parametrize("m", [1, 2])
def test_keywords_for_any_stage_sliced_or_whole(m):
    torch.manual_seed(0)
    stages = [Gated() for _ in range(3)]
    plain = copy.deepcopy(stages)
    pipe = po.Emulator(stages, sgd, mse, "1f1b", m)
    optimizer = sgd([p for s in plain for p in s.parameters()])
    for _ in range(4):
        x, y, first, second, table = double(4, WIDTH), double(4, WIDTH), double(4, 1), double(4, 1), double(WIDTH, WIDTH)
        stage_kwargs = {1: {"gate": second, "power": 2}, 2: {"table": po.Whole(table)}}
        loss = pipe.step(x, target=y, gate=first, stage_kwargs=stage_kwargs)
        expected = mse(plain[2](plain[1](plain[0](x, gate=first), gate=second, power=2), table=table), y)
        torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=1e-12)
        expected.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_close(nn.Sequential(*stages), nn.Sequential(*plain))
    value = pipe.eval_step(x, target=y, gate=first, stage_kwargs=stage_kwargs)
    expected = mse(plain[2](plain[1](plain[0](x, gate=first), gate=second, power=2), table=table), y)
    torch.testing.assert_close(value, expected.detach(), rtol=0, atol=1e-12)


def test_keywords_of_a_micro_batch_stay_with_it_in_an_asynchronous_pipeline():
    seen = []

    class Tagged(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x, tag):
            seen.append((x[0, 0].item(), tag))
            return x.detach() + 0 * self.scale

    pipe = po.Emulator(
        [Tagged() for _ in range(3)], lambda p: torch.optim.SGD(p, lr=1.0), lambda out, y: out.sum() * 0, "pipeoptim"
    )
    for n in range(7):
        pipe.step(torch.full((2, 1), float(n)), stage_kwargs={k: {"tag": n} for k in range(3)})
    assert len(seen) == 21
    assert all(value == tag for value, tag in seen)


def bad(words, *args, m=2, uneven=False, loss_weight=None, **kwargs):
    return words, args, {"m": m, "uneven": uneven, "loss_weight": loss_weight}, kwargs


@pytest.mark.parametrize(
    ("words", "args", "options", "kwargs"),
    [
        bad("multiple of 2, other microbatches, or uneven=True", double(5, WIDTH)),
        bad("no batch dimension.*pipeoptim.Whole", double(4, WIDTH), gate=torch.tensor(1.0)),
        bad("have 4 and 6 rows.*pipeoptim.Whole", double(4, WIDTH), gate=double(6, 1)),
        bad("stage_kwargs names stage 3; stages 0 .. 1 exist", double(4, WIDTH), stage_kwargs={3: {}}),
        bad("keyword 'gate' of stage 0 is given twice", double(4, WIDTH), gate=1, stage_kwargs={0: {"gate": 1}}),
        bad("3 of the 5 rows of the input, but 5 of 10", double(5, WIDTH), target=double(10, WIDTH), uneven=True),
        bad(r"loss_weight returned \[0.0, 0.0\]", double(4, WIDTH), target=double(4, WIDTH), loss_weight=lambda y: 0),
    ],
)
def test_inputs_that_cannot_be_cut_are_refused_with_a_sentence(words, args, options, kwargs):
    pipe = po.Emulator(
        [Gated(), Gated()], sgd, mse, "1f1b", options["m"], uneven=options["uneven"], loss_weight=options["loss_weight"]
    )
    with pytest.raises(po.ConfigError, match=words) as raised:
        pipe.step(*args, **kwargs)
    assert "\n" not in str(raised.value)
