"""The emulator against an oracle that keeps every past version in a list (float64, 1e-10), warm-up and drains included."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
import pipeoptim as po

WIDTH = 3


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    def forward(self, x):
        return torch.tanh(self.linear(x))


def latest_at_forward(use):
    return use.stage.weights[use.at_f]


def latest_at_backward(use):
    return use.stage.weights[use.at_b]


def ahead(weights, direction, by):
    return [w - by * d for w, d in zip(weights, direction, strict=True)]


def predictor(rule):
    return lambda u: ahead(u.stage.weights[u.at_f], rule.ahead(u.stage, u.at_f), rule.lr * u.gap)


def double_buffered(u):
    n = u.i // u.micro
    return u.stage.weights[u.start + (n if u.depth == 1 else max(0, n - 1))]


def entry_version(u):
    return u.stage.weights[u.start + oracle.updates_before_forward(u.i, 0, u.depth, u.micro, u.slack)]


def in_updates(s, u):
    """``s`` micro-batches ahead of the j-th of a mini-batch, counted in updates (once per mini-batch)."""
    j = u.i % u.micro
    return sum(q * u.micro + j < s for q in range(s))


def spectrain(rule):
    def f(u):
        return ahead(u.stage.weights[u.at_f], u.stage.v[u.at_f], rule.lr * in_updates(u.k // 2 + u.depth - u.k - 1, u))

    def b(u):
        return ahead(u.stage.weights[u.at_b], u.stage.v[u.at_b], rule.lr * in_updates(u.k // 2, u))

    return f, b


def xpipe(rule):
    def direction(stage, version):
        pairs = zip(stage.v[version], stage.m[version], strict=True)
        return [10 * v / ((1000 * m).sqrt() + 1e-8) for v, m in pairs]

    def f(u):
        first = u.i - u.i % u.micro
        version = u.start + oracle.updates_before_forward(first, u.k, u.depth, u.micro)
        s = round((u.depth + u.micro - u.k / 2 - 2) / u.micro) if u.depth > 1 else 0
        return ahead(u.stage.weights[version], direction(u.stage, version), rule.lr * max(0, s))

    def b(u):
        s = (u.micro + u.k // 2 - 1) // u.micro
        return ahead(u.stage.weights[u.at_b], direction(u.stage, u.at_b), rule.lr * s)

    return f, b


def looking_back(u):
    return ahead(u.stage.weights[u.at_b], u.stage.delta[u.at_b], u.gap)


def error_feedback(gaps):
    """``u(t) + s u(t) - s u(t-1)``; the learning rate is constant here."""

    def correct(k, stage, weights, d, grads):
        before = stage.directions[-1] or [torch.zeros_like(x) for x in d]
        return [(1 + gaps[k]) * x - gaps[k] * old for x, old in zip(d, before, strict=True)]

    return correct


def spikes(gaps, rule):
    """The share of its effect that a gradient has missed, from the sums ``1 + m + m^2 + ...`` of what it would have done."""

    def correct(k, stage, weights, d, grads):
        if rule.name == "sgd":
            return d
        left = 0.9 ** gaps[k]
        if rule.name == "momentum":
            decayed = [g + rule.wd * w for g, w in zip(grads, weights, strict=True)]
            return [left * v + (1 - left) / (1 - 0.9) * g for v, g in zip(d, decayed, strict=True)]
        t, m, v = (stage.state[name] for name in "tmv")
        numerators = [left * a / (1 - 0.9**t) + (1 - left) * g for a, g in zip(m, grads, strict=True)]
        roots = [(b / (1 - 0.999**t)).sqrt() + 1e-8 for b in v]
        return [n / r + rule.wd * w for n, r, w in zip(numerators, roots, weights, strict=True)]

    return correct


def corrections(method, depth, m, rule, slack=0):
    """What is applied in place of an update; None for most methods."""
    mean = [sum(max(0, -(-(oracle.ahead(k, depth, slack) - i) // m)) for i in range(m)) / m for k in range(depth)]
    return {
        "pipedream_2bw+error_feedback": error_feedback([min(1, depth - 1)] * depth),
        "spike_compensation": spikes(mean, rule),
    }.get(method)


def uses(method, rule):
    return {
        "naive": (latest_at_forward, latest_at_backward),
        "pipedream": (latest_at_forward, latest_at_forward),
        "pipedream+vertical_sync": (entry_version, entry_version),
        "pipedream_2bw": (double_buffered, double_buffered),
        "pipedream_2bw+error_feedback": (double_buffered, double_buffered),
        "spectrain": spectrain(rule),
        "xpipe": xpipe(rule),
        "pipemare": (latest_at_forward, looking_back),
        "nesterov": (latest_at_forward, latest_at_forward),
        "nesterov+no_stash": (latest_at_forward, latest_at_backward),
        "pipeoptim": (predictor(rule), latest_at_backward),
        "spike_compensation": (predictor(rule), latest_at_backward),
        "pipeoptim_stash": (predictor(rule), predictor(rule)),
        "gpipe": (latest_at_backward, latest_at_backward),
        "1f1b": (latest_at_backward, latest_at_backward),
    }[method]


def annealed(depth, m, anneal, synchronous=0, slack=0):
    """PipeMare's T1, from its formula: no delay and so no factor in the synchronous part, which T1 is counted from."""

    def rate(k, version):
        left = 1 - min((version - synchronous) / anneal, 1)
        return 1.0 if version < synchronous else delay(k, depth, m, slack) ** -left

    return rate


def delay(k, depth, m, slack=0):
    return max(1, -(-oracle.ahead(k, depth, slack) // m))


def takes_slack(method):
    """Methods that flush, or that count by a formula for the depth, do not."""
    return not po.METHODS[method].program(2, 2).flushes and method not in ("spectrain", "xpipe")


RULES = [("sgd", 0.0), ("momentum", 0.0), ("momentum", 0.01), ("adamw", 0.0), ("adamw", 0.1)]


@pytest.mark.parametrize("method", sorted(po.METHODS))
@settings(max_examples=30)
@given(
    depth=st.integers(1, 8),
    m=st.integers(1, 8),
    layers=st.integers(1, 2),
    rule=st.sampled_from(RULES),
    drains=st.booleans(),
    slack=st.sampled_from([0, 0.5, 1, 2, "uneven"]),
    seed=st.integers(0, 2**16),
)
def test_emulator_equals_the_oracle(method, depth, m, layers, rule, drains, slack, seed):
    torch.manual_seed(seed)
    slack = 0 if not takes_slack(method) else tuple(torch.randint(3, (depth - 1,)).tolist()) if slack == "uneven" else slack
    rule = oracle.Rule("nadam") if method.startswith("nesterov") else oracle.Rule(rule[0], wd=rule[1])
    if po.METHODS[method].at_least_depth_microbatches:
        m = max(m, oracle.ahead(0, depth, slack) + 1)
    stages = [torch.nn.Sequential(*(Layer() for _ in range(layers))) for _ in range(depth)]
    initial = [[p.detach().clone() for p in s.parameters()] for s in stages]
    total = 3 * depth + 3
    segments = [depth + 1, 2, total - depth - 3] if drains else [total]
    batches = [(torch.randn(m, WIDTH).double(), torch.randn(m, WIDTH).double()) for _ in range(total)]

    pipe = po.Emulator(stages, rule.torch, torch.nn.functional.mse_loss, method=method, microbatches=m, slack=slack or 0)
    losses = oracle.feed(pipe, batches, segments)

    rate = annealed(depth, m, 1000, slack=slack) if method == "pipemare" else lambda k, version: 1.0
    gammas = [0.135 ** (1 / delay(k, depth, m, slack)) for k in range(depth)]
    used = uses(method, rule)
    correct = corrections(method, depth, m, rule, slack)
    expected, expected_losses = oracle.train(initial, rule, segments, batches, m, *used, rate, gammas, correct, slack=slack)
    assert losses == pytest.approx(expected_losses, abs=1e-10, rel=0)
    for k, stage in enumerate(stages):
        assert pipe.version(k) == total
        for p, w in zip(stage.parameters(), expected[k].weights[-1], strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=0, atol=1e-10)


def compare_with_oracle(method, depth, m, rule, make, segments, uses, rate, gammas=None):
    """Train emulator and oracle from the same weights on the same batches; losses and weights agree to 1e-10."""
    torch.manual_seed(5)
    stages = [Layer() for _ in range(depth)]
    initial = [[p.detach().clone() for p in s.parameters()] for s in stages]
    batches = [(torch.randn(m, WIDTH).double(), torch.randn(m, WIDTH).double()) for _ in range(sum(segments))]
    pipe = po.Emulator(stages, make(stages), torch.nn.functional.mse_loss, method=method, microbatches=m)
    losses = [pipe.step(x, target=y).item() for x, y in batches]
    pipe.drain()
    expected, expected_losses = oracle.train(initial, rule, segments, batches, m, *uses, rate, gammas)
    assert losses == pytest.approx(expected_losses, abs=1e-10, rel=0)
    for k, stage in enumerate(stages):
        for p, w in zip(stage.parameters(), expected[k].weights[-1], strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=0, atol=1e-10)


@pytest.mark.parametrize("m", [1, 2, 4])
@pytest.mark.parametrize("synchronous", [0, 5])
@pytest.mark.parametrize("correct", [False, True])
@pytest.mark.parametrize("anneal", [0, 7])
def test_every_part_of_pipemare_equals_the_oracle(anneal, correct, synchronous, m):
    """T1, T2 and T3, alone, together and none of them. T3 is a drain after each of the first updates."""
    depth, rule = 4, oracle.Rule("momentum")
    method = po.get_method(
        f"pipemare(anneal_updates={anneal}, decay=0.3, correct={correct}, synchronous_updates={synchronous})"
    )
    rate = annealed(depth, m, anneal, synchronous) if anneal else lambda k, version: 1.0
    gammas = [0.3 ** (1 / delay(k, depth, m)) for k in range(depth)]
    used = (latest_at_forward, looking_back if correct else latest_at_backward)
    segments = [1] * synchronous + [15]
    compare_with_oracle(method, depth, m, rule, lambda stages: rule.torch, segments, used, rate, gammas)


@pytest.mark.parametrize("method", ["nesterov", "nesterov+no_stash", "nesterov(stash=False, anneal_updates=9)"])
def test_nesterov_with_its_own_optimizer_equals_the_oracle(method):
    """torch's NAdam with beta1 = 0.99, or rising with the delay, decoupled decay, and PipeMare's T1 as an option."""
    depth, lr, own = 4, 0.05, po.get_method(method).optimizer
    assert own.options(0, depth)["betas"] == ((0.9 + 3 * 0.09 / 4, 0.999) if "stash" in method else (0.99, 0.999))

    def nadam(k, params):
        return torch.optim.NAdam(params, lr=lr, **own.options(k, depth))

    class PerStage(oracle.Rule):
        def step(self, stage, weights, grads):
            k = known.setdefault(id(stage), len(known))  # the first update of the oracle goes from stage to stage
            self.torch = partial(nadam, k)
            return self.torch_step(stage, weights, grads)

    known = {}
    rate = annealed(depth, 1, 9) if "anneal" in method else lambda k, version: 1.0
    used = (latest_at_forward, latest_at_backward if "stash" in method else latest_at_forward)
    make = lambda stages: [nadam(k, list(s.parameters())) for k, s in enumerate(stages)]  # noqa: E731
    compare_with_oracle(method, depth, 1, PerStage("nadam", lr=lr), make, [15], used, rate)


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


def test_pipedream_2bw_is_one_update_behind_on_every_stage():
    """``W(t+1) = W(t) - lr * g(W(t-1))`` of the whole model, without any pipeline."""
    torch.manual_seed(0)
    depth = m = 4
    stages = [Layer() for _ in range(depth)]
    model = torch.nn.Sequential(*stages)
    versions = [[p.detach().clone() for p in model.parameters()]]
    pipe = po.Emulator(stages, lambda p: torch.optim.SGD(p, lr=0.1), torch.nn.functional.mse_loss, "pipedream_2bw", m)
    batches = [(torch.randn(m, WIDTH).double(), torch.randn(m, WIDTH).double()) for _ in range(9)]
    for x, y in batches:
        pipe.step(x, target=y)
    pipe.drain()
    final = [p.detach().clone() for p in model.parameters()]
    for n, (x, y) in enumerate(batches):
        with torch.no_grad():
            for p, w in zip(model.parameters(), versions[max(0, n - 1)], strict=True):
                p.copy_(w)
        grads = torch.autograd.grad(torch.nn.functional.mse_loss(model(x), y), list(model.parameters()))
        versions.append([w - 0.1 * g for w, g in zip(versions[n], grads, strict=True)])
    for a, b in zip(final, versions[-1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_pipemare_t3_is_synchronous_at_first():
    from pipeoptim.methods.catalog.pipemare import pipemare

    def run(method, steps):
        torch.manual_seed(0)
        stages = [Layer() for _ in range(3)]
        pipe = po.Emulator(stages, lambda p: torch.optim.SGD(p, lr=0.1), torch.nn.functional.mse_loss, method)
        g = torch.Generator().manual_seed(1)
        for _ in range(steps):
            x = torch.randn(2, WIDTH, generator=g, dtype=torch.float64)
            pipe.step(x, target=x.flip(1))
        return torch.cat([p.detach().flatten() for s in stages for p in s.parameters()])

    t3 = pipemare(anneal_updates=0, correct=False, synchronous_updates=5)
    assert t3.name == "pipemare+T3"
    assert torch.equal(run(t3, 5), run("1f1b", 5))
    assert not torch.equal(run(t3, 9), run("1f1b", 9))
