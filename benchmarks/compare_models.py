"""The two small settings of ``compare_all.py``: recipes whose runs take seconds, with eight blocks for up to eight stages."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeoptim.config import Component, TrainConfig


class Residual(nn.Module):
    """``x + Linear(relu(LayerNorm(x)))`` on ``[B, width]``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.linear(torch.relu(self.norm(x)))
        return out


def digits_mlp(width: int = 64) -> nn.Sequential:
    """Eight blocks from ``[B, 1, 8, 8]`` to logits ``[B, 10]``: input, six residual blocks, head."""
    first = nn.Sequential(nn.Flatten(), nn.Linear(64, width))
    return nn.Sequential(first, *(Residual(width) for _ in range(6)), nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10)))


class Mix(nn.Module):
    """A causal block on ``[B, T, width]``: each position sees itself and the one ``shift`` before it, through a small MLP."""

    def __init__(self, width: int, shift: int) -> None:
        super().__init__()
        self.shift = shift
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(2 * width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        before = nn.functional.pad(h, (0, 0, self.shift, 0))[:, : h.shape[1]]
        out: Tensor = x + self.down(torch.relu(self.up(torch.cat([h, before], -1))))
        return out


def dilated(vocab_size: int = 98, width: int = 48) -> nn.Sequential:
    """Eight blocks from ids ``[B, T]`` to logits ``[B, T, vocab]``: embedding, six blocks (shifts 1, 2, 4, 8, 16, 1), head."""
    blocks = [Mix(width, 2 ** (n % 5)) for n in range(6)]
    head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocab_size, bias=False))
    return nn.Sequential(nn.Embedding(vocab_size, width), *blocks, head)


def small_digits() -> TrainConfig:
    """Handwritten digits, a residual net of 30,000 weights, 11 passes over the data."""
    return TrainConfig(
        recipe="small_digits",
        model=Component("compare_models:digits_mlp"),
        data=Component("pipeoptim_zoo.data.digits:digits"),
        optimizer=Component("sgd", {"lr": 0.05, "momentum": 0.9}),
        lr_schedule=Component("cosine", {"warmup": 20, "final": 0.1}),
        stages=4,
        batch_size=64,
        steps=250,
        eval_every=25,
        eval_batches=5,
    )


def small_chars() -> TrainConfig:
    """A dilated causal net of 95,000 weights on the source of Python's standard library, character by character.

    Not a GPT: one this small spends most of a run of seconds on the plateau of letter frequencies, and when it leaves it is
    chance. This net has none.
    """
    return TrainConfig(
        recipe="small_chars",
        model=Component("compare_models:dilated"),
        data=Component("pipeoptim_zoo.data.stdlib_text:chars", {"context": 32}),
        optimizer=Component("adamw", {"lr": 3e-3, "weight_decay": 0.01}),
        lr_schedule=Component("cosine", {"warmup": 30, "final": 0.1}),
        stages=4,
        batch_size=32,
        steps=300,
        eval_every=30,
        eval_batches=8,
    )
