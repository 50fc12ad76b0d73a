"""The models whose blocks exchange several tensors learn in a pipeline what they learn without one."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import pipeoptim as po
from pipeoptim_zoo.data.losses import auxiliary_cross_entropy, cross_entropy, label_smoothing
from pipeoptim_zoo.models.gnmt import gnmt
from pipeoptim_zoo.models.googlenet import googlenet
from pipeoptim_zoo.models.inception_v3 import inception_v3
from pipeoptim_zoo.models.recurrent import residual_lstm

Loss = Callable[..., Tensor]
IMAGES, LABELS = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3])
IDS = torch.tensor([[4, 5, 0, 2, 6, 7], [5, 0, 0, 2, 8, 0], [6, 7, 8, 2, 4, 4], [8, 4, 5, 2, 9, 9]])
NEXT = torch.tensor([[6, 7, 3], [8, 3, -100], [4, 4, 3], [9, 9, 3]])
CASES: dict[str, tuple[Callable[[], nn.Sequential], Tensor, Tensor, Loss]] = {
    "googlenet": (lambda: googlenet(32, 5, 0.05, dropout=0, auxiliary_dropout=0), IMAGES, LABELS, auxiliary_cross_entropy),
    "inception_v3": (lambda: inception_v3(32, 5, 0.05, dropout=0), IMAGES, LABELS, auxiliary_cross_entropy),
    "gnmt": (lambda: gnmt(12, 3, 8, 8, dropout=0), IDS, NEXT, label_smoothing),
    "residual_lstm": (lambda: residual_lstm(12, 5, 8, 4, dropout=0), IDS, LABELS, cross_entropy),
}


@pytest.mark.parametrize("name", CASES)
def test_a_synchronous_pipeline_equals_the_whole_model(name: str) -> None:
    make, x, y, loss_fn = CASES[name]
    torch.manual_seed(0)
    whole = make()
    parts = copy.deepcopy(whole)
    third = len(parts) // 3
    stages = [parts[:third], parts[third : 2 * third], parts[2 * third :]]
    pipe = po.Emulator(stages, lambda params: torch.optim.SGD(params, lr=0.05), loss_fn, method="gpipe")
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.05)
    for _ in range(3):
        loss = loss_fn(whole(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(pipe.step(x, target=y), loss.detach(), rtol=0, atol=0)
    for (key, ours), theirs in zip(parts.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs), key
    whole.eval()
    torch.testing.assert_close(pipe.eval_step(x, target=y), loss_fn(whole(x), y).detach())


@pytest.mark.parametrize("name", CASES)
def test_predicted_weights_reach_every_kind_of_block(name: str) -> None:
    """With a learning rate of 0 every prediction is the weights themselves: the losses must be those without a pipeline."""
    make, x, y, loss_fn = CASES[name]
    torch.manual_seed(0)
    whole = make()
    parts = copy.deepcopy(whole)
    half = len(parts) // 2
    pipe = po.Emulator(
        [parts[:half], parts[half:]],
        lambda params: torch.optim.Adam(params, lr=0.0),
        loss_fn,
        method="pipeoptim",
    )
    losses = [float(pipe.step(x, target=y)) for _ in range(3)]
    pipe.drain()
    assert losses == pytest.approx([float(loss_fn(whole(x), y).detach()) for _ in range(3)])
