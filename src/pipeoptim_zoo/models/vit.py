"""Vision transformer: Dosovitskiy et al., "An Image is Worth 16x16 Words" (ICLR 2021)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pipeoptim.errors import ConfigError
from pipeoptim_zoo.models.transformer import Block, initialise

__all__ = ["ClassifierHead", "Patches", "vit", "vit_b16"]


class Patches(nn.Module):
    """Cuts an image in patches, embeds each, puts a class token before them and adds positions.

    ``[B, 3, S, S]`` to ``[B, 1 + (S / patch)**2, width]``.
    """

    def __init__(self, input_size: int, patch: int, width: int, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, 1 + (input_size // patch) ** 2, width))
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.embed.weight, std=1 / math.sqrt(3 * patch * patch))
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        out: Tensor = self.dropout(x)
        return out


class ClassifierHead(nn.Module):
    """Norm and linear classifier on the class token: ``[B, T, width]`` to ``[B, classes]``."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.project = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.project(self.norm(x[:, 0]))
        return logits


def vit(
    input_size: int = 32,
    patch: int = 4,
    width: int = 192,
    layers: int = 12,
    heads: int = 3,
    classes: int = 100,
    dropout: float = 0.0,
) -> nn.Sequential:
    """``layers + 2`` blocks from images ``[B, 3, input_size, input_size]`` to logits ``[B, classes]``.

    Raises ConfigError where ``patch`` does not divide ``input_size``. Deviation: GPT-2's initial weights.

    >>> tuple(vit(layers=1)(torch.zeros(2, 3, 32, 32)).shape)
    (2, 100)
    """
    if input_size % patch:
        raise ConfigError(f"patch={patch} does not divide input_size={input_size}; choose a divisor")
    blocks = [Block(width, heads, dropout, causal=False) for _ in range(layers)]
    model = nn.Sequential(Patches(input_size, patch, width, dropout), *blocks, ClassifierHead(width, classes))
    initialise(model)
    return model


def vit_b16(input_size: int = 224, classes: int = 1000, dropout: float = 0.0) -> nn.Sequential:
    """ViT-B/16 (width 768, 12 layers and heads): 86,567,656 parameters at 224 and 1000 classes."""
    return vit(input_size, 16, 768, 12, 12, classes, dropout)
