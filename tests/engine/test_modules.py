"""Stages made of the modules that go wrong first, against brute force: each version written into the module itself.

Shared, frozen, unused, complex, empty and transposed parameters, and modules that change their input in place, at random depths.
"""

import copy
import random

import pytest
import torch
from torch import nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

import pipeoptim as po
from pipeoptim.methods import PredictorContext
from pipeoptim.methods.average_predictors import SmoothedAdam

WIDTH, LR, DECAY = 6, 0.03, 0.1


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.b.weight = self.a.weight

    def forward(self, x):
        return torch.tanh(self.b(torch.relu(self.a(x))) @ self.a.weight.t())


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.a.weight.requires_grad_(False)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.never = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.ones(3))

    def forward(self, x):
        return torch.tanh(self.a(x))


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        norm = nn.LayerNorm(WIDTH)
        self.s = nn.Sequential(
            nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH), nn.ELU(inplace=True), norm, nn.Hardtanh(inplace=True)
        )

    def forward(self, x):
        return self.s(x)


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.complex128) * 0.3)

    def forward(self, x):
        return torch.tanh((x.to(torch.complex128) @ self.w.t()).real)


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.c = nn.Parameter(torch.randn(WIDTH, WIDTH).t() * 0.3), nn.Parameter(torch.tensor(1.0))
        self.empty = nn.Parameter(torch.zeros(0))

    def forward(self, x):
        return torch.tanh(x @ self.w) * self.c + self.empty.sum()


KINDS = [Shared, Frozen, Unused, InPlace, Complex, Odd]
MAKERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=torch.tensor(LR, dtype=torch.float64), weight_decay=DECAY),
}


def trained(module):
    return [p for p in module.parameters() if p.requires_grad]


def direction(optimizer, p):
    """The predicted change of ``p`` per update, written out by hand."""
    state = optimizer.state.get(p, {})
    if "momentum_buffer" in state:
        return -LR * state["momentum_buffer"]
    if "exp_avg" not in state:
        return torch.zeros_like(p)
    real = torch.view_as_real if p.is_complex() else (lambda t: t)
    t, m, v = float(state["step"]), real(state["exp_avg"]), real(state["exp_avg_sq"])
    d = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    return -LR * ((torch.view_as_complex(d) if p.is_complex() else d) + DECAY * p.detach())


class Versions:
    """A stage whose every version is kept, with the direction that its update went."""

    def __init__(self, module, make):
        self.module, self.params, self.optimizer = module, trained(module), make(trained(module))
        self.weights, self.directions = [self.values()], [[torch.zeros_like(p) for p in self.params]]

    def values(self):
        return [p.detach().clone() for p in self.params]

    def put(self, tensors):
        with torch.no_grad(), _unsafe_preserve_version_counter(tuple(self.params)):
            for p, t in zip(self.params, tensors, strict=True):
                p.copy_(t)

    def predicted(self, version, gap):
        return [w + gap * d for w, d in zip(self.weights[version], self.directions[version], strict=True)]

    def update(self, gradients):
        self.put(self.weights[-1])
        for p, g in zip(self.params, gradients, strict=True):
            p.grad = g
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.weights.append(self.values())
        self.directions.append([direction(self.optimizer, p) for p in self.params])


def brute_force(modules, make, method, m, batches):
    """Final weights of each stage."""
    depth, stages = len(modules), [Versions(module, make) for module in modules]
    for n, (xs, ys) in enumerate(batches):
        sums = [[None] * len(s.params) for s in stages]
        for j, (x, y) in enumerate(zip(xs.chunk(m), ys.chunk(m), strict=True)):
            flights = []
            for k, s in enumerate(stages):
                at_f = max(0, n * m + j - (depth - 1 - k)) // m
                w = s.predicted(at_f, n - at_f) if method.startswith("pipeoptim") else s.weights[at_f]
                s.put(w)
                leaf = x.detach().clone().requires_grad_(k > 0)
                x = s.module(leaf.clone())
                flights.append((leaf, x, w))
            gradient = None
            for k in reversed(range(depth)):
                s, (leaf, out, w) = stages[k], flights[k]
                s.put(s.weights[n] if method in ("naive", "pipeoptim") else w)
                (nn.functional.mse_loss(out, y) / m if k == depth - 1 else out).backward(gradient)
                gradient = leaf.grad
                for q, p in enumerate(s.params):
                    if p.grad is not None:
                        sums[k][q] = p.grad if sums[k][q] is None else sums[k][q] + p.grad
                        p.grad = None
        for s, gradients in zip(stages, sums, strict=True):
            s.update(gradients)
    return [s.weights[-1] for s in stages]


@pytest.mark.parametrize("method", ["naive", "pipedream", "pipeoptim", "pipeoptim_stash"])
@pytest.mark.parametrize("optimizer", MAKERS)
@pytest.mark.parametrize("first", KINDS, ids=lambda kind: kind.__name__)
def test_unusual_modules_equal_brute_force(method, optimizer, first):
    draw = random.Random(f"{method} {optimizer} {first.__name__}")
    torch.manual_seed(draw.randrange(2**31))
    depth, m, make = draw.randint(2, 5), draw.randint(1, 4), MAKERS[optimizer]
    stages = [kind().double() if kind is not Complex else kind() for kind in [first, *draw.choices(KINDS, k=depth - 1)]]
    batches = [tuple(torch.randn(2, 2 * m, WIDTH, dtype=torch.float64)) for _ in range(2 * depth)]
    fed, twins = [x.clone() for x, _ in batches], copy.deepcopy(stages)
    pipe = po.Emulator(stages, lambda p: make([q for q in p if q.requires_grad]), nn.functional.mse_loss, method, m)
    for x, y in batches:
        pipe.step(x, target=y)
    pipe.drain()
    expected = brute_force(twins, make, method, m, [(x, y) for x, (_, y) in zip(fed, batches, strict=True)])
    assert all(torch.equal(x, before) for (x, _), before in zip(batches, fed, strict=True)), "the user's batch was changed"
    for stage, weights in zip(stages, expected, strict=True):
        for p, w in zip(trained(stage), weights, strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=0, atol=1e-10)


def test_xpipe_moves_complex_weights_as_their_real_parts_and_refuses_sparse_gradients():
    torch.manual_seed(0)
    program, w = po.METHODS["xpipe"].program(3, 2), torch.randn(4, dtype=torch.complex128)
    pair = [nn.Parameter(w), nn.Parameter(torch.view_as_real(w).clone())]
    predictors = [SmoothedAdam(PredictorContext(torch.optim.SGD([p], lr=0.1), program, 0)) for p in pair]
    for _ in range(3):
        pair[0].grad = torch.randn(4, dtype=torch.complex128)
        pair[1].grad = torch.view_as_real(pair[0].grad)
        for predictor in predictors:
            predictor.after_step()
    out = [torch.empty_like(p) for p in pair]
    for predictor, buffer in zip(predictors, out, strict=True):
        predictor.predict_into([buffer], 2)
    assert torch.equal(torch.view_as_real(out[0]), out[1])
    assert not torch.equal(out[1], pair[1])
    pipe = po.Emulator([nn.Embedding(9, 3, sparse=True), nn.Linear(3, 3)], torch.optim.SGD, nn.functional.mse_loss, "xpipe")
    pipe.step(torch.arange(4), target=torch.ones(4, 3))  # stage 0 updates in the next one
    with pytest.raises(po.ConfigError, match="set sparse=False in the embedding"):
        pipe.step(torch.arange(4), target=torch.ones(4, 3))
