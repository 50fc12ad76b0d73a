"""The transformer block that the language model (``gpt``) and the image model (``vit``) share."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional

from pipeoptim.errors import ConfigError

__all__ = ["Attention", "Block", "initialise"]

INIT_STD = 0.02


class Attention(nn.Module):
    """Self-attention of ``heads`` heads, ``[B, T, width]`` to the same; ``causal`` hides what is later."""

    def __init__(self, width: int, heads: int, dropout: float, causal: bool, bias: bool) -> None:
        super().__init__()
        if width < 1 or heads < 1 or width % heads:
            raise ConfigError(f"width={width} is not a positive multiple of heads={heads}; choose heads that divide it")
        self.heads, self.p, self.causal = heads, dropout, causal
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        p = self.p if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal, dropout_p=p)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return out


class Block(nn.Module):
    """A pre-norm block: ``x + attention(norm(x))``, then ``x + mlp(norm(x))`` with 4 * width hidden units.

    ``causal=True`` is GPT-2's (no bias in attention, GELU by tanh), ``causal=False`` is ViT's.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0, causal: bool = True) -> None:
        super().__init__()
        eps = 1e-5 if causal else 1e-6
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attention = Attention(width, heads, dropout, causal, bias=not causal)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.up = nn.Linear(width, 4 * width)
        self.gelu = nn.GELU(approximate="tanh" if causal else "none")
        self.down = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        out: Tensor = x + self.dropout(self.down(self.gelu(self.up(self.norm2(x)))))
        return out


def initialise(model: nn.Module) -> None:
    """GPT-2's weights: normal(0, 0.02), zero biases, and 0.02 / sqrt(2 L) where one of L blocks ends.

    Every block adds two terms to the residual stream; the smaller weights keep its variance independent of L.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=INIT_STD)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for block in blocks:
        for last in (block.attention.out, block.down):
            nn.init.normal_(last.weight, std=INIT_STD / math.sqrt(2 * len(blocks)))
