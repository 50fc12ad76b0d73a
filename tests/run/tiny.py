"""Recipes small enough for tests: milliseconds per step, with everything that a resumed run must restore."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeoptim.config import Component, TrainConfig


def model(width: int = 16) -> nn.Sequential:
    """Four blocks with parameters; BatchNorm statistics and dropout's random numbers are state too."""
    return nn.Sequential(
        nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.Tanh()),
        nn.Dropout(0.2),
        nn.Sequential(nn.Linear(width, width), nn.Tanh()),
        nn.Sequential(nn.Linear(width, width), nn.Dropout(0.1)),
        nn.Linear(width, 3),
    )


def tied() -> nn.Sequential:
    """First and last block share their weights."""
    first, last = nn.Linear(6, 6), nn.Linear(6, 6)
    last.weight = first.weight
    return nn.Sequential(first, nn.Linear(6, 6), last)


def empty() -> nn.Sequential:
    """Nothing to train."""
    return nn.Sequential(nn.Identity(), nn.Tanh())


def plain() -> nn.Sequential:
    """Linear layers only: no dropout, whose random numbers are drawn per stage."""
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3))


class Task:
    """Random inputs, labels that depend on them. Takes ``seconds`` per batch, a minute from step ``stuck`` on, and crashes
    at the step that the environment names."""

    def __init__(self, seed: int, seconds: float = 0.0, stuck: int | None = None) -> None:
        self.seed, self.seconds, self.stuck = seed, seconds, stuck

    def _batch(self, seed: int, size: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(size, 6, generator=torch.Generator().manual_seed(seed))
        return x, (x[:, :3] + x[:, 3:]).argmax(1)

    def train_batch(self, step: int, batch_size: int) -> tuple[Tensor, Tensor]:
        if os.environ.get("TINY_CRASH_AT") == str(step):
            raise OSError(f"the disk of the data is gone at step {step}")
        time.sleep(60 if self.stuck is not None and step >= self.stuck else self.seconds)
        return self._batch(1000 * self.seed + step, batch_size)

    def validation_batches(self, batch_size: int) -> list[tuple[Tensor, Tensor]]:
        return [self._batch(7 + i, batch_size) for i in range(max(0, 64 // batch_size))]

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target)

    def metrics(self, output: Tensor, target: Tensor) -> dict[str, float]:
        return {"accuracy": float((output.argmax(-1) == target).float().mean())}

    def describe(self) -> str:
        return "tiny: random numbers"


class BadBatch(Task):
    """Mini-batch ``bad`` has an input that is not a number."""

    def __init__(self, seed: int, bad: int) -> None:
        super().__init__(seed)
        self.bad = bad

    def train_batch(self, step: int, batch_size: int) -> tuple[Tensor, Tensor]:
        x, y = super().train_batch(step, batch_size)
        return (x / 0 if step == self.bad else x), y


class VectorLoss(Task):
    """A loss that somebody forgot to reduce."""

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target, reduction="none")


class DetachedLoss(Task):
    """A loss that somebody cut from the graph."""

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return super().loss(output.detach(), target)


class Missing(Task):
    """Data whose file is not there."""

    def __init__(self) -> None:
        Path("nowhere.bin").read_text()


def recipe() -> TrainConfig:
    """24 steps, 2 stages, a checkpoint every 8."""
    return TrainConfig(
        recipe="tiny",
        model=Component("tiny:model"),
        data=Component("tiny:Task"),
        optimizer=Component("adamw", {"lr": 0.01, "weight_decay": 0.1}),
        lr_schedule=Component("cosine", {"warmup": 4, "final": 0.1}),
        stages=2,
        batch_size=8,
        steps=24,
        eval_every=6,
        eval_batches=2,
        checkpoint_every=8,
    )


def steady() -> TrainConfig:
    """A learning rate that does not depend on how long the run is."""
    return replace(recipe(), lr_schedule=Component("constant"))


def paper_prediction() -> TrainConfig:
    """Predictions by the paper's formula, as the recipes of the paper's settings ask for."""
    return replace(recipe(), prediction="paper")


def slow() -> TrainConfig:
    """As long as it takes to send it a signal: 20 ms per step, on each of two stages."""
    return replace(recipe(), data=Component("tiny:Task", {"seconds": 0.02}), steps=120, eval_every=0, checkpoint_every=40)


def stuck() -> TrainConfig:
    """Five mini-batches, and then nothing."""
    return replace(recipe(), data=Component("tiny:Task", {"stuck": 5}), eval_every=0, checkpoint_every=0)


def vector_loss() -> TrainConfig:
    """The loss is not a scalar."""
    return replace(recipe(), data=Component("tiny:VectorLoss"))


def detached_loss() -> TrainConfig:
    """The loss has no gradient."""
    return replace(recipe(), data=Component("tiny:DetachedLoss"))


def missing_data() -> TrainConfig:
    """The data cannot be read."""
    return replace(recipe(), data=Component("tiny:Missing"))


def nothing_to_train() -> TrainConfig:
    """A model without parameters."""
    return replace(recipe(), model=Component("tiny:empty"))


def with_argument(width: int) -> TrainConfig:
    """A recipe that cannot be called as it is."""
    return replace(recipe(), batch_size=width)


def tied_weights() -> TrainConfig:
    """Weights on two stages."""
    return replace(recipe(), model=Component("tiny:tied"))


def misfit() -> TrainConfig:
    """Model and data that do not fit."""
    return replace(recipe(), model=Component("pipeoptim_zoo.models.digits_cnn:digits_cnn"))


def not_a_config() -> str:
    """Not a recipe at all."""
    return "chars"


class Poison(torch.autograd.Function):
    """The identity, whose backward makes a weight NaN."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.weight = weight
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        if ctx.weight is not None:
            ctx.weight.data.fill_(float("nan"))
        return gradient, None


class Poisoned(nn.Module):
    """A side branch with weights of its own, which add nothing to the output. They become NaN in the backward of training forward number
    ``at``, so that neither the loss nor a gradient tells."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.side, self.at, self.seen = nn.Parameter(torch.zeros(3)), at, 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += self.training
        weight = self.side if self.training and self.seen == self.at else None
        return x + 0.0 * Poison.apply(self.side.nan_to_num().clone(), weight).nan_to_num().sum()


def poisoned_model(at: int = 10) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), Poisoned(at), nn.Linear(8, 8), nn.Linear(8, 3))


def poisoned() -> TrainConfig:
    """Weights of stage 0 become NaN between two checkpoints (those of steps 8 and 16), and no loss shows it."""
    return replace(recipe(), model=Component("tiny:poisoned_model"), method="1f1b")


class Masked(nn.Module):
    """A mask with infinities, saved with the weights as such masks often are."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((8, 8), -torch.inf).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mask.softmax(1).sum() * 0.0


def masked() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), Masked(), nn.Linear(8, 3))


class Spoiled(nn.Module):
    """Its output is not a number in training forward number ``at``."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.seen = at, 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += self.training
        return x * float("nan") if self.training and self.seen == self.at else x


def spoiled_model(at: int = 10) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), Spoiled(at), nn.Linear(8, 8), nn.Linear(8, 3))
