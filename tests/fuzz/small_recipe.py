"""A recipe that is built and trained in milliseconds, for command lines drawn at random."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeoptim.config import Component, TrainConfig


def model() -> nn.Sequential:
    """Four blocks with parameters."""
    return nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 6), nn.Linear(6, 3))


class Task:
    """Random inputs, and labels that depend on them."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def train_batch(self, step: int, batch_size: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(batch_size, 6, generator=torch.Generator().manual_seed(1000 * (self.seed % 1000) + step))
        return x, (x[:, :3] + x[:, 3:]).argmax(1)

    def validation_batches(self, batch_size: int) -> list[tuple[Tensor, Tensor]]:
        return [self.train_batch(7 + i, batch_size) for i in range(16 // batch_size)]

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target)

    def metrics(self, output: Tensor, target: Tensor) -> dict[str, float]:
        return {"accuracy": float((output.argmax(-1) == target).float().mean())}

    def describe(self) -> str:
        return "random numbers"


def recipe(tiny: bool = False) -> TrainConfig:
    """Three steps on two stages."""
    return TrainConfig(
        recipe="small_recipe:recipe",
        model=Component("small_recipe:model"),
        data=Component("small_recipe:Task"),
        optimizer=Component("adamw", {"lr": 0.01}),
        stages=2,
        batch_size=4,
        steps=3,
        eval_every=0,
        eval_batches=1,
        checkpoint_every=2,
    )
