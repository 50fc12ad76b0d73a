"""Gradient clipping against torch's own ``clip_grad_norm_`` and against an oracle that keeps every version."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import oracle
import pipeoptim as po
from pipeoptim.engine.stage.clip import Clipper
from pipeoptim.engine.stage.clipped_stage import ClippedStage

WIDTH = 3
loss_fn = nn.functional.mse_loss
SCOPES = ["stage", "global", "global_delayed"]


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    def forward(self, x):
        return torch.tanh(self.linear(x))


def momentum(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def data(n, batch, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return [tuple(torch.randn(batch, WIDTH, generator=g, dtype=dtype) for _ in "xy") for _ in range(n)]


@pytest.mark.parametrize("scope", ["stage", "global"])
@pytest.mark.parametrize("m", [1, 4])
def test_depth_1_equals_plain_pytorch_bit_for_bit(scope, m):
    torch.manual_seed(1)
    ours = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, WIDTH))
    plain = copy.deepcopy(ours)
    opt = momentum(plain.parameters())
    pipe = po.Emulator([ours], momentum, loss_fn, "pipeoptim", m, clip=po.Clip(0.3, scope))
    assert pipe.grad_norm(0) is None
    for x, y in data(8, 4, torch.float32):
        pipe.step(x, target=y)
        for xm, ym in zip(x.chunk(m), y.chunk(m), strict=True):
            (loss_fn(plain(xm), ym) / m).backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.3)
        opt.step()
        opt.zero_grad()
        assert pipe.grad_norm(0) == float(norm)
        assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("method", ["gpipe", "1f1b"])
@settings(max_examples=15)
@given(depth=st.integers(1, 6), m=st.integers(1, 6), scope=st.sampled_from(["stage", "global"]), limit=st.floats(0.01, 2))
def test_flush_methods_equal_the_unpipelined_model(method, depth, m, scope, limit):
    torch.manual_seed(2)
    stages = [Layer() for _ in range(depth)]
    plain = copy.deepcopy(stages)
    model = nn.Sequential(*plain)
    opt = momentum(model.parameters())
    pipe = po.Emulator(stages, momentum, loss_fn, method, m, clip=po.Clip(limit, scope))
    for x, y in data(4, 2 * m):
        pipe.step(x, target=y)
        loss_fn(model(x), y).backward()
        if scope == "global":
            norms = [nn.utils.clip_grad_norm_(model.parameters(), limit)] * depth
        else:
            norms = [nn.utils.clip_grad_norm_(part.parameters(), limit) for part in plain]
        assert [pipe.grad_norm(k) for k in range(depth)] == pytest.approx([float(norm) for norm in norms], rel=1e-12)
        opt.step()
        opt.zero_grad()
    for p, q in zip(nn.Sequential(*stages).parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def norm_of(gradients):
    return math.sqrt(sum(float((g * g).sum()) for g in gradients))


class OracleClip:
    """What :class:`pipeoptim.Clip` says, spelled out with the gradients of all stages at hand."""

    def __init__(self, limit, scope, delay):
        self.limit, self.scope, self.delay = limit, scope, delay
        self.totals, self.used = [], []

    def __call__(self, t, gradients):
        own = [norm_of(g) for g in gradients]
        self.totals.append(norm_of([part for g in gradients for part in g]))
        assert len(self.totals) == t + 1
        if self.scope == "global":
            own = [self.totals[t]] * len(own)
        elif self.scope == "global_delayed" and t >= self.delay:
            own = [max(norm, self.totals[t - self.delay]) for norm in own]
        self.used.append(own)
        return [[g * min(1, self.limit / (norm + 1e-6)) for g in part] for norm, part in zip(own, gradients, strict=True)]


@pytest.mark.parametrize("method", ["naive", "pipedream", "pipeoptim", "pipeoptim_stash"])
@settings(max_examples=25)
@given(
    depth=st.integers(1, 6),
    m=st.integers(1, 6),
    scope=st.sampled_from(SCOPES),
    limit=st.floats(0.02, 1),
    drains=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_asynchronous_methods_equal_the_oracle(method, depth, m, scope, limit, drains, seed):
    m = max(m, depth - 1) if scope == "global" else m
    torch.manual_seed(seed)
    rule = oracle.Rule("momentum")
    stages = [Layer() for _ in range(depth)]
    initial = [[p.detach().clone() for p in s.parameters()] for s in stages]
    total = 3 * depth + 3
    segments = [depth + 1, 2, total - depth - 3] if drains else [total]
    batches = data(total, m)
    pipe = po.Emulator(stages, rule.torch, loss_fn, method, m, clip=po.Clip(limit, scope))
    oracle.feed(pipe, batches, segments)

    def at_forward(u):
        return u.stage.weights[u.at_f]

    def at_backward(u):
        return u.stage.weights[u.at_b]

    def predicted(u):
        pairs = zip(at_forward(u), rule.ahead(u.stage, u.at_f), strict=True)
        return [w - rule.lr * u.gap * d for w, d in pairs]

    uses = {
        "naive": (at_forward, at_backward),
        "pipedream": (at_forward, at_forward),
        "pipeoptim": (predicted, at_backward),
        "pipeoptim_stash": (predicted, predicted),
    }[method]
    expected = OracleClip(limit, scope, max(1, math.ceil(depth / m)))
    theirs, _ = oracle.train(initial, rule, segments, batches, m, *uses, clip=expected)
    assert [pipe.grad_norm(k) for k in range(depth)] == pytest.approx(expected.used[-1], rel=1e-9)
    for k, stage in enumerate(stages):
        for p, w in zip(stage.parameters(), theirs[k].weights[-1], strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=0, atol=1e-10)


@pytest.mark.parametrize("scope", SCOPES)
def test_resuming_is_exact(scope):
    def build():
        torch.manual_seed(3)
        stages = [Layer() for _ in range(4)]
        return stages, po.Emulator(stages, momentum, loss_fn, "pipeoptim", 3, clip=po.Clip(0.05, scope))

    stages, pipe = build()
    for n, (x, y) in enumerate(data(12, 6)):
        pipe.step(x, target=y)
        if n == 6:
            pipe.drain()
            states = copy.deepcopy([pipe.stage_state_dict(k) for k in range(4)])
    pipe.drain()
    resumed, again = build()
    for k in range(4):
        again.load_stage_state_dict(k, states[k])
    for x, y in data(12, 6)[7:]:
        again.step(x, target=y)
    again.drain()
    for a, b in zip(stages, resumed, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", [0.0, 0.5, 1 - 1e-6, 1.0, 1 + 1e-7, 3.0, math.inf, math.nan])
@pytest.mark.parametrize("limit", [1.0, math.inf])
def test_gradients_are_scaled_as_torch_does_and_left_alone_where_its_factor_is_1(limit, norm, dtype):
    values = torch.tensor([1.5, -0.0, math.inf, math.nan, 5e-39], dtype=dtype)
    ours, theirs = (nn.Parameter(torch.zeros(5, dtype=dtype)) for _ in "ab")
    ours.grad, theirs.grad = values.clone(), values.clone()
    clipper = Clipper(po.Clip(limit), ClippedStage([ours], po.get_method("pipeoptim").program(1, 1)))
    clipper.apply(norm)
    nn.utils.clip_grads_with_norm_([theirs], limit, torch.tensor(norm, dtype=dtype))
    assert torch.equal(ours.grad.view(torch.uint8), theirs.grad.view(torch.uint8))
    factor = (limit / (torch.tensor(norm, dtype=dtype) + 1e-6)).clamp(max=1)
    assert (ours.grad._version > 0) == (float(factor) != 1)


def test_an_infinite_limit_measures_without_clipping():
    finals = []
    for clip in (None, po.Clip(float("inf"), "global_delayed")):
        torch.manual_seed(4)
        stages = [Layer() for _ in range(3)]
        pipe = po.Emulator(stages, momentum, loss_fn, clip=clip)
        for x, y in data(9, 2):
            pipe.step(x, target=y)
        finals.append(torch.cat([p.detach().flatten() for s in stages for p in s.parameters()]))
    assert torch.equal(*finals)
    assert pipe.grad_norm(0) > 0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: po.Clip(0.0), "max_norm is 0.0"),
        (lambda: po.Clip(float("nan")), "max_norm is nan"),
        (lambda: po.Clip(1.0, "globl"), "must be one of stage, global, global_delayed"),
        (
            lambda: po.Emulator([Layer() for _ in range(4)], momentum, loss_fn, "naive", 2, clip=po.Clip(1.0, "global")),
            "set microbatches to 3 or more, use scope 'global_delayed'",
        ),
    ],
)
def test_bad_input_is_refused_with_a_sentence(make, words):
    with pytest.raises(po.ConfigError, match=words):
        make()
