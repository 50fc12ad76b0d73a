"""A recipe whose processes kill themselves, each once, at exact places of F, B, U and of an evaluation. Only where they are replaced."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import tiny
from pipeoptim.config import Component, TrainConfig


def die_once(name: str) -> None:
    """End this process by SIGKILL, the first time that any process comes here."""
    if "PIPEOPTIM_SUPERVISED" in os.environ:
        try:
            os.close(os.open(f"died-{name}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)


class DiesInBackward(torch.autograd.Function):
    """The identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, number: int) -> Tensor:
        ctx.number = number
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if ctx.number == 45:
            die_once("backward")
        return gradient, None


class Mortal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.seen = nn.Linear(6, 16), 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += self.training
        return DiesInBackward.apply(self.linear(x), self.seen)  # type: ignore[no-any-return]


def model() -> nn.Sequential:
    return nn.Sequential(Mortal(), nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(0.2)), nn.Linear(16, 3))


class Optimizer(torch.optim.AdamW):
    """Dies after it has moved the weights, before anybody knows; of the stage in the middle."""

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        weight = self.param_groups[0]["params"][0]
        if weight.shape == (16, 16) and self.state[weight]["step"] == 14:
            die_once("update")
        return result


class Task(tiny.Task):
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 30:
            die_once("forward")
        return super().loss(output, target)

    def metrics(self, output: Tensor, target: Tensor) -> dict[str, float]:
        if os.path.exists("died-update"):
            die_once("evaluation")
        return super().metrics(output, target)


def recipe() -> TrainConfig:
    """24 steps, 3 stages, 2 micro-batches, norms that all stages exchange."""
    return replace(
        tiny.recipe(),
        model=Component("dying:model"),
        data=Component("dying:Task"),
        optimizer=Component("dying:Optimizer", {"lr": 0.01, "weight_decay": 0.1}),
        stages=3,
        microbatches=2,
        clip=1.0,
        clip_scope="global",
    )
