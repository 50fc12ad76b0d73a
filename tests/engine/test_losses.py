"""Several losses: named parts that are reported, and losses that inner stages raise by themselves."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import pipeoptim as po

mse = nn.functional.mse_loss


def sgd(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


class Sparse(nn.Module):
    """Wants small activations, and says so twice."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.linear, self.reentrant = nn.Linear(3, 3, dtype=torch.float64), reentrant

    def inner(self, x):
        y = torch.tanh(self.linear(x))
        po.add_loss("sparse", 0.1 * y.abs().mean())
        po.add_loss("sparse", 0.1 * (y**2).mean())
        return y

    def forward(self, x):
        return self.inner(x) if self.reentrant is None else checkpoint(self.inner, x, use_reentrant=self.reentrant)


def batches(n=6, rows=5):
    g = torch.Generator().manual_seed(0)
    return [tuple(torch.randn(2, rows, 3, generator=g, dtype=torch.float64)) for _ in range(n)]


@pytest.mark.parametrize("checkpointed", [None, False])
@pytest.mark.parametrize("m", [1, 3])
def test_losses_of_inner_stages_equal_their_sum_in_an_unpartitioned_model(checkpointed, m):
    torch.manual_seed(0)
    stages = [Sparse(checkpointed) for _ in range(3)]
    plain = copy.deepcopy(nn.Sequential(*stages))
    pipe = po.Emulator(stages, sgd, mse, "1f1b", m, uneven=True)
    optimizer = sgd(plain.parameters())
    for x, y in batches():
        loss = pipe.step(x, target=y)
        with po.collect_losses() as found:
            main = mse(plain(x), y)
        (main + sum(found.values())).backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(loss, main.detach(), rtol=0, atol=1e-12)
        torch.testing.assert_close(pipe.loss_parts["sparse"], found["sparse"].detach(), rtol=0, atol=1e-12)
    for p, q in zip(nn.Sequential(*stages).parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)
    plain(batches()[0][0])  # without a collector, and in evaluation, nothing happens
    pipe.eval_step(batches()[0][0], target=batches()[0][1])


def test_losses_of_inner_stages_are_scaled_with_the_loss():
    finals = []
    for scaler in (None, lambda: torch.amp.GradScaler("cpu", init_scale=4.0)):
        torch.manual_seed(0)
        stages = [Sparse() for _ in range(3)]
        pipe = po.Emulator(stages, sgd, mse, "pipeoptim", 2, scaler=scaler)
        for x, y in batches(rows=4):
            pipe.step(x, target=y)
        pipe.drain()
        finals.append(torch.cat([p.detach().flatten() for s in stages for p in s.parameters()]))
    torch.testing.assert_close(*finals, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", [lambda a, b: {"loss": a + b, "a": a, "b": b.item()}, lambda a, b: (a + b, {"a": a, "b": b})])
def test_parts_of_the_loss_are_means_over_the_mini_batch(form):
    torch.manual_seed(0)
    stages = [nn.Linear(3, 3, dtype=torch.float64) for _ in range(2)]
    plain = copy.deepcopy(nn.Sequential(*stages))
    pipe = po.Emulator(stages, sgd, lambda out, y: form(mse(out, y), 0.1 * out.abs().mean()), "1f1b", 3, uneven=True)
    for x, y in batches(3):
        out = plain.load_state_dict(nn.Sequential(*stages).state_dict()) and plain(x)
        loss = pipe.step(x, target=y)
        a, b = mse(out, y), 0.1 * out.abs().mean()
        torch.testing.assert_close(loss, (a + b).detach(), rtol=0, atol=1e-12)
        assert pipe.loss_parts["a"].item() == pytest.approx(a.item())
        assert pipe.loss_parts["b"].item() == pytest.approx(b.item())
    evaluated = pipe.eval_step(x, target=y)
    out = nn.Sequential(*stages)(x)
    torch.testing.assert_close(evaluated, (mse(out, y) + 0.1 * out.abs().mean()).detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ({"nll": torch.tensor(1.0)}, "without 'loss'"),
        ((torch.tensor(1.0), torch.tensor(2.0)), r"a tuple of 2; return the loss, or \(loss, {name: part}\)"),
        ({"loss": torch.ones(2)}, r"loss_fn returned a tensor of shape \(2,\)"),
        ({"loss": torch.tensor(1.0), "logits": torch.ones(2)}, r"shape \(2,\) as the part 'logits'"),
    ],
)
def test_results_that_are_no_loss_are_refused(result, words):
    with pytest.raises(po.ConfigError, match=words):
        po.Emulator([nn.Linear(1, 1)], sgd, lambda out, y: result).step(torch.ones(1, 1))


def test_losses_that_would_be_lost_are_refused():
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(po.ConfigError, match="use_reentrant=False"):
        po.Emulator([Sparse(True)], sgd, mse).step(x, target=x.detach())
    with po.collect_losses(), pytest.raises(po.ConfigError, match="must be a scalar tensor"):
        po.add_loss("vector", torch.ones(2))
