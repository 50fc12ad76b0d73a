"""The emulator against an oracle that keeps every past version in a list (float64, 1e-10), warm-up and drains included."""

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pipeoptim as po

WIDTH = 3


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    def forward(self, x):
        return torch.tanh(self.linear(x))


def latest_at_forward(stage, at_f, at_b, gap):
    return stage.weights[at_f]


def latest_at_backward(stage, at_f, at_b, gap):
    return stage.weights[at_b]


def predictor(rule):
    def predicted(stage, at_f, at_b, gap):
        d = rule.ahead(stage, at_f)
        return [w - rule.lr * gap * x for w, x in zip(stage.weights[at_f], d, strict=True)]

    return predicted


def uses(method, rule):
    return {
        "naive": (latest_at_forward, latest_at_backward),
        "pipedream": (latest_at_forward, latest_at_forward),
        "pipeoptim": (predictor(rule), latest_at_backward),
        "pipeoptim_stash": (predictor(rule), predictor(rule)),
    }[method]


@pytest.mark.parametrize("method", ["naive", "pipedream", "pipeoptim", "pipeoptim_stash"])
@settings(max_examples=30)
@given(
    depth=st.integers(1, 8),
    m=st.integers(1, 8),
    layers=st.integers(1, 2),
    rule=st.sampled_from([("sgd", 0.0), ("momentum", 0.0), ("momentum", 0.01), ("adamw", 0.0), ("adamw", 0.1)]),
    drains=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_emulator_equals_the_oracle(method, depth, m, layers, rule, drains, seed):
    torch.manual_seed(seed)
    rule = oracle.Rule(rule[0], wd=rule[1])
    stages = [torch.nn.Sequential(*(Layer() for _ in range(layers))) for _ in range(depth)]
    initial = [[p.detach().clone() for p in s.parameters()] for s in stages]
    total = 3 * depth + 3
    segments = [depth + 1, 2, total - depth - 3] if drains else [total]
    batches = [(torch.randn(m, WIDTH).double(), torch.randn(m, WIDTH).double()) for _ in range(total)]

    pipe = po.Emulator(stages, rule.torch, torch.nn.functional.mse_loss, method=method, microbatches=m)
    losses, fed = [], iter(batches)
    for minibatches in segments:
        for _ in range(minibatches):
            x, y = next(fed)
            losses.append(pipe.step(x, target=y).item())
        pipe.drain()

    expected, expected_losses = oracle.train(initial, rule, segments, batches, m, *uses(method, rule))
    assert losses == pytest.approx(expected_losses, abs=1e-10, rel=0)
    for k, stage in enumerate(stages):
        assert pipe.version(k) == total
        for p, w in zip(stage.parameters(), expected[k].weights[-1], strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=0, atol=1e-10)


def test_the_methods_differ_where_they_should():
    """The oracle test would be empty if all methods computed the same; at depth 3 they must not."""
    finals = {}
    for method in ("naive", "pipedream", "pipeoptim", "pipeoptim_stash", "1f1b"):
        torch.manual_seed(0)
        stages = [Layer() for _ in range(3)]
        pipe = po.Emulator(stages, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), torch.nn.functional.mse_loss, method)
        for _ in range(9):
            pipe.step(torch.randn(4, WIDTH).double(), target=torch.randn(4, WIDTH).double())
        pipe.drain()
        finals[method] = tuple(torch.cat([p.detach().flatten() for p in stages[0].parameters()]).tolist())
    assert len(set(finals.values())) == len(finals)
