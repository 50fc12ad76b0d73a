"""Parts of real training scripts, one test each: frozen stages, adapters, compiled stages, normalisation, repeated weights."""

import copy

import pytest
import torch
from torch import nn

import oracle
import pipeoptim as po
from test_oracle import WIDTH, Layer, uses

mse = nn.functional.mse_loss


def sgd(params):
    return torch.optim.SGD([p for p in params if p.requires_grad], lr=0.2, momentum=0.9)


def data(n, rows=4):
    g = torch.Generator().manual_seed(0)
    return [tuple(torch.randn(2, rows, WIDTH, generator=g, dtype=torch.float64)) for _ in range(n)]


class Adapted(nn.Module):
    """A frozen layer with a low-rank adapter beside it, as LoRA has."""

    def __init__(self):
        super().__init__()
        self.base = Layer().requires_grad_(False)
        self.down = nn.Linear(WIDTH, 2, bias=False, dtype=torch.float64)
        self.up = nn.Linear(2, WIDTH, bias=False, dtype=torch.float64)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def train_plain(model, batches):
    optimizer = sgd(model.parameters())
    for x, y in batches:
        mse(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1)])
def test_frozen_stages_stay_and_the_others_learn_as_without_a_pipeline(frozen):
    torch.manual_seed(0)
    stages = [Layer().requires_grad_(k not in frozen) for k in range(3)]
    plain = copy.deepcopy(nn.Sequential(*stages))
    optimizers = [None if k in frozen else sgd(stage.parameters()) for k, stage in enumerate(stages)]
    pipe = po.Emulator(stages, optimizers, mse, "1f1b", 2)
    for x, y in data(5):
        pipe.step(x, target=y)
    train_plain(plain, data(5))
    for p, q in zip(nn.Sequential(*stages).parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["1f1b", "pipeoptim", "pipedream"])
def test_adapters_learn_and_the_frozen_weights_are_neither_copied_nor_changed(method):
    torch.manual_seed(0)
    stages = [Adapted() for _ in range(3)]
    plain = copy.deepcopy(nn.Sequential(*stages))
    pipe = po.Emulator(stages, [sgd(s.parameters()) for s in stages], mse, method, 1)
    for x, y in data(8):
        pipe.step(x, target=y)
    pipe.drain()
    for k, (stage, before) in enumerate(zip(stages, plain, strict=True)):
        for p, q in zip(stage.base.parameters(), before.base.parameters(), strict=True):
            assert torch.equal(p, q)
        frozen = sum(p.nbytes for p in stage.base.parameters())
        trained = sum(p.nbytes for p in stage.parameters()) - frozen
        assert pipe.weight_bytes(k) <= frozen + trained * pipe.weight_copies(k)
    if method == "1f1b":
        train_plain(plain, data(8))
        for p, q in zip(nn.Sequential(*stages).parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_a_parameter_shared_between_stages_is_refused_unless_it_is_frozen():
    stages = [Layer(), Layer(), Layer()]
    stages[2].linear.weight = stages[0].linear.weight
    with pytest.raises(po.ConfigError, match="stages 0 and 2 share a parameter .'linear.weight'"):
        po.Emulator(stages, sgd, mse)
    stages[0].linear.weight.requires_grad_(False)
    po.Emulator(stages, sgd, mse)


@pytest.mark.parametrize("method", ["naive", "pipedream", "pipeoptim"])
def test_compiled_stages_equal_the_oracle(method):
    """What compiled code saves of its weights must be found again by the backward, as in eager mode."""
    torch.manual_seed(1)
    rule = oracle.Rule("momentum", lr=0.3)
    layers = [nn.Sequential(Layer(), Layer()) for _ in range(3)]
    initial = [[p.detach().clone() for p in s.parameters()] for s in layers]
    stages = [torch.compile(layer, backend="aot_eager") for layer in layers]
    pipe = po.Emulator(stages, rule.torch, mse, method)
    batches = data(8)
    for x, y in batches:
        pipe.step(x, target=y)
    pipe.drain()
    expected, _ = oracle.train(initial, rule, [8], batches, 1, *uses(method, rule))
    for stage, other in zip(layers, expected, strict=True):
        for p, w in zip(stage.parameters(), other.weights[-1], strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=0, atol=1e-10)
