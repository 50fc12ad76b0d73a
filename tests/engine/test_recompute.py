"""Activation checkpointing: on the forward's weights it changes no bit, on the backward's it equals an oracle that recomputes."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import oracle
import pipeoptim as po
from test_oracle import WIDTH, Layer, uses

mse = nn.functional.mse_loss
METHODS = sorted(po.METHODS)


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


class Checkpointed(nn.Module):
    """``inner``, checkpointed or not; ``reentrant`` None: not."""

    def __init__(self, inner, reentrant):
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x):
        return self.inner(x) if self.reentrant is None else checkpoint(self.inner, x, use_reentrant=self.reentrant)


class Views(nn.Module):
    """Uses its weight through a view, and twice."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(double(WIDTH, WIDTH) / 2)

    def forward(self, x):
        return torch.sin(x @ self.weight.t()) @ self.weight[:, :2] @ self.weight[:2]


def stage(reentrant):
    return nn.Sequential(Layer(), Checkpointed(nn.Sequential(Views(), nn.Dropout(0.3), Layer()), reentrant), Layer())


def run(method, m, reentrant, recompute):
    torch.manual_seed(0)
    stages = [stage(reentrant) for _ in range(4)]
    optimizers = lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9)  # noqa: E731
    pipe = po.Emulator(stages, optimizers, mse, method, m, seed=1, recompute=recompute)
    g, peaks = torch.Generator().manual_seed(2), [0] * 4
    for n in range(9):
        x = torch.randn(2 * m, WIDTH, generator=g, dtype=torch.float64)
        pipe.step(x, target=x.flip(1))
        peaks = [max(peak, pipe.weight_bytes(k)) for k, peak in enumerate(peaks)]
        if n == 4:
            pipe.drain()
    copies = [peak / sum(p.nbytes for p in s.parameters()) for peak, s in zip(peaks, stages, strict=True)]
    assert all(measured <= pipe.weight_copies(k) for k, measured in enumerate(copies))
    return torch.cat([p.detach().flatten() for s in stages for p in s.parameters()]), copies


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("m", [1, 4])
def test_recomputation_on_the_weights_of_the_forward_changes_no_bit(method, m):
    if po.METHODS[method].at_least_depth_microbatches and m < 4:
        pytest.skip("needs more micro-batches")
    plain, _ = run(method, m, None, "backward")
    for reentrant in (False, True):
        again, copies = run(method, m, reentrant, "forward")
        assert torch.equal(plain, again), f"use_reentrant={reentrant}"
        if method == "pipeoptim" and m == 1:
            assert copies == [5, 4, 3, 1], "the forward's predicted weights are kept until the backward, beside the latest"
    if po.METHODS[method].program(4, m).flushes or method.startswith("pipedream"):
        return
    later, _ = run(method, m, False, "backward")
    same = torch.equal(plain, later)
    assert same == isinstance(po.METHODS[method].backward, type(po.METHODS["pipedream"].backward)), "the two kinds must differ"


@pytest.mark.parametrize("method", ["1f1b", "naive", "pipedream", "pipedream_2bw", "pipeoptim", "pipeoptim_stash", "spectrain"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("m", [1, 4])
def test_recomputation_on_the_weights_of_the_backward_equals_the_oracle(method, reentrant, m):
    if po.METHODS[method].at_least_depth_microbatches and m < 4:
        pytest.skip("needs more micro-batches")
    torch.manual_seed(3)
    rule = oracle.Rule("momentum", lr=0.3)
    stages = [Checkpointed(nn.Sequential(Layer(), Layer()), reentrant) for _ in range(4)]
    initial = [[p.detach().clone() for p in s.parameters()] for s in stages]
    batches = [(double(m, WIDTH).requires_grad_(), double(m, WIDTH)) for _ in range(10)]
    pipe = po.Emulator(stages, rule.torch, mse, method, m)
    for n, (x, y) in enumerate(batches):
        pipe.step(x, target=y)  # a reentrant checkpoint needs an input with a gradient
        if n == 5:
            pipe.drain()
    pipe.drain()
    with torch.no_grad():
        expected, _ = oracle.train(initial, rule, [6, 4], batches, m, *uses(method, rule), recompute=True)
    for k, one in enumerate(stages):
        assert pipe.weight_bytes(k) <= pipe.weight_copies(k) * sum(p.nbytes for p in one.parameters())
        for p, w in zip(one.parameters(), expected[k].weights[-1], strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=0, atol=1e-10)


def test_batchnorm_statistics_advance_in_both_forwards_as_in_plain_torch():
    def build():
        torch.manual_seed(4)
        return nn.Sequential(nn.Linear(3, 3), Checkpointed(nn.Sequential(nn.BatchNorm1d(3), nn.Tanh()), False), nn.Linear(3, 3))

    ours, plain = build(), build()
    pipe = po.Emulator([ours[:2], ours[2:]], lambda p: torch.optim.SGD(p, lr=0.1), mse, "1f1b")
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(3):
        x = torch.randn(6, 3)
        pipe.step(x, target=x)
        mse(plain(x), x).backward()
        optimizer.step()
        optimizer.zero_grad()
    for a, b in zip(ours.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


def test_bad_use_is_refused_with_a_sentence():
    sgd = lambda p: torch.optim.SGD(p, lr=0.1)  # noqa: E731
    with pytest.raises(po.ConfigError, match="recompute is 'never', must be one of backward, forward"):
        po.Emulator([Layer()], sgd, mse, recompute="never")
    compiled = [torch.compile(Layer(), backend="eager"), Layer()]
    with pytest.raises(po.ConfigError, match="recompute is 'forward', but the stage is compiled"):
        po.Emulator(compiled, sgd, mse, recompute="forward")
    po.Emulator(compiled, sgd, mse, "pipedream", recompute="forward")  # its backward runs on the forward's weights anyway
