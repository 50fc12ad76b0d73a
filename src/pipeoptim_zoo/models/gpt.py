"""A GPT-2 style decoder as a flat sequence of blocks: the language model of the zoo's experiments.

Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019): pre-norm blocks, learned
positions, GELU, normal(0, 0.02) weights, residual projections divided by sqrt(2 * layers).
Deviations: the head has its own weights (tied weights would join the first stage and the last one), and the
linear layers of attention have no bias.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeoptim_zoo.models.transformer import Block, initialise

__all__ = ["Embedding", "TokenHead", "gpt"]


class Embedding(nn.Module):
    """Token embedding plus learned position: ids ``[B, T]`` (int64, T <= context) to ``[B, T, width]``."""

    def __init__(self, vocab_size: int, context: int, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor) -> Tensor:
        length, context = ids.shape[1], self.positions.num_embeddings
        if length > context:
            raise ValueError(f"sequence of {length} tokens is longer than context={context}; shorten it or raise context")
        where = torch.arange(length, device=ids.device)
        out: Tensor = self.dropout(self.tokens(ids) + self.positions(where))
        return out


class TokenHead(nn.Module):
    """Final norm and projection to logits: ``[B, T, width]`` to ``[B, T, vocab_size]``."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, vocab_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.project(self.norm(x))
        return logits


def gpt(vocab_size: int, context: int, width: int, layers: int, heads: int, dropout: float = 0.0) -> nn.Sequential:
    """A decoder-only transformer of ``layers + 2`` blocks: embedding, ``layers`` blocks, head.

    Maps ids ``[B, T]`` (int64, T <= context) to logits ``[B, T, vocab_size]``. Parameters:
    ``width * (2 * vocab_size + context + 2) + layers * (12 * width**2 + 9 * width)``.

    Raises ConfigError where ``heads`` does not divide ``width``, ValueError where a sequence is longer than
    ``context``.

    >>> model = gpt(vocab_size=98, context=64, width=32, layers=2, heads=4)
    >>> len(model), tuple(model(torch.zeros(3, 64, dtype=torch.long)).shape)
    (4, (3, 64, 98))
    """
    model = nn.Sequential(
        Embedding(vocab_size, context, width, dropout),
        *(Block(width, heads, dropout) for _ in range(layers)),
        TokenHead(width, vocab_size),
    )
    initialise(model)
    return model
