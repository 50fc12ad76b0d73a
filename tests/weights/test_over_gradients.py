"""Large stages predict into the memory of their gradients: the same bits as in buffers, and no more memory."""

import pytest
import torch
from torch import nn

import pipeoptim as po
from pipeoptim.kernels import available
from pipeoptim.rules import Predictor
from pipeoptim.weights import store

pytestmark = pytest.mark.skipif(not available(), reason="no C compiler")

METHODS = sorted(name for name, method in po.METHODS.items() if method.forward.predicts and method.predictor is None)


def train(method, m, large, monkeypatch, optimizer=torch.optim.AdamW, **options):
    """Losses, weights and most bytes of every stage; and how many predictions were made over gradients."""
    monkeypatch.setattr(store, "LARGE", large)
    made = []
    original = Predictor.fused_step_over_gradients
    monkeypatch.setattr(Predictor, "fused_step_over_gradients", lambda self, s: made.append(original(self, s)) or made[-1])
    torch.manual_seed(0)
    stages = [nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh()) for _ in range(4)]
    pipe = po.Emulator(stages, lambda p: optimizer(p, lr=0.01), nn.functional.mse_loss, method, m, **options)
    generator = torch.Generator().manual_seed(1)
    losses, most = [], [0] * 4
    for n in range(14):
        x, y = torch.randn(2, 8, 6, generator=generator)
        losses.append(pipe.step(x, target=y))
        most = [max(most[k], pipe.weight_bytes(k)) for k in range(4)]
        if n == 8:
            pipe.drain()
    pipe.drain()
    monkeypatch.undo()
    done = len([1 for one in made if one is not None])
    made.clear()
    return losses, [p.detach().clone() for s in stages for p in s.parameters()], most, done


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("m", [1, 2, 4])
def test_training_is_the_same_bit_for_bit_and_takes_no_more_memory(method, m, monkeypatch):
    losses, weights, most, done = train(method, m, 0, monkeypatch)
    expected, others, usual, never = train(method, m, 1 << 40, monkeypatch)
    assert never == 0
    assert all(map(torch.equal, losses, expected)) and all(map(torch.equal, weights, others))
    assert all(a <= b for a, b in zip(most, usual, strict=True))
    if method == "pipeoptim" and m == 1:
        assert done >= 3 * 10  # three stages predict; in their first updates torch makes the optimizer's state


def test_hooks_that_keep_gradients_find_them_unchanged(monkeypatch):
    kept = []

    class Keeping(torch.optim.AdamW):
        def __init__(self, params, **options):
            params = list(params)
            super().__init__(params, **options)
            for p in params:
                p.register_post_accumulate_grad_hook(lambda p: kept.append((p.grad, p.grad.clone())))

    *_, done = train("pipeoptim", 1, 0, monkeypatch, optimizer=Keeping)
    assert done == 0 and len(kept) > 100 and all(torch.equal(grad, then) for grad, then in kept)


def test_several_predictions_per_version_use_buffers_that_stay(monkeypatch):
    every = train("pipeoptim", 4, 0, monkeypatch)[-1]  # one prediction per version on each of three stages
    *_, done = train("pipeoptim", 2, 0, monkeypatch)  # two of them on stage 0, which finds out at the first
    assert every * 2 / 3 <= done <= every * 2 / 3 + 2
