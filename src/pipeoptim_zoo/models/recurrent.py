"""LSTM layers as blocks, and a residual LSTM that classifies text.

What travels between the blocks beside the features is a mask (bool, no gradient): a stage cannot know from
the features alone which positions are padding.
"""

from __future__ import annotations

from torch import Tensor, nn

from pipeoptim_zoo.data.losses import PADDING
from pipeoptim_zoo.models.chain import Chain

__all__ = ["MeanPool", "RecurrentLayer", "TokenEmbedding", "residual_lstm", "run_lstm"]


def run_lstm(lstm: nn.LSTM, x: Tensor) -> Tensor:
    """Outputs of all steps, ``[B, T, inputs]`` to ``[B, T, width]``; the final state is not needed."""
    out: Tensor = lstm(x)[0]
    return out


class TokenEmbedding(nn.Module):
    """Ids ``[B, T]`` to (features ``[B, T, width]``, mask ``[B, T]``, True where there is a token)."""

    def __init__(self, vocab_size: int, width: int, dropout: float) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, width, padding_idx=PADDING)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.dropout(self.tokens(ids)), ids != PADDING


class RecurrentLayer(nn.Module):
    """``x + lstm(dropout(x))``, or without the shortcut where ``residual`` is False. Padding comes after
    the tokens, and an LSTM that reads from left to right does not see it before its last token."""

    def __init__(self, width: int, dropout: float, residual: bool) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.residual = residual

    def forward(self, x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        out = run_lstm(self.lstm, self.dropout(x))
        return (out + x if self.residual else out, *others)


class MeanPool(nn.Module):
    """Mean over the tokens, then a linear layer: (``[B, T, width]``, mask ``[B, T]``) to ``[B, classes]``."""

    def __init__(self, width: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.project = nn.Linear(width, classes)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        weight = mask.to(x.dtype).unsqueeze(-1)
        mean = (x * weight).sum(1) / weight.sum(1).clamp(min=1)
        logits: Tensor = self.project(self.dropout(mean))
        return logits


def residual_lstm(vocab_size: int, classes: int = 2, width: int = 256, layers: int = 8, dropout: float = 0.2) -> Chain:
    """Text classification by a stack of LSTM layers with shortcuts, in ``layers + 2`` blocks.

    Ids ``[B, T]`` (int64, 0 is padding, at the end) to logits ``[B, classes]``. The first layer has no
    shortcut. Parameters: ``vocab_size * width + layers * (8 * width**2 + 8 * width) + (width + 1) *
    classes``.
    Source: the shortcuts are those of Wu et al. (2016), section 3.1; the mean over positions is ours.

    >>> import torch
    >>> tuple(residual_lstm(vocab_size=50, width=16, layers=2)(torch.ones(3, 7, dtype=torch.long)).shape)
    (3, 2)
    """
    return Chain(
        TokenEmbedding(vocab_size, width, dropout),
        *(RecurrentLayer(width, dropout, residual=number > 0) for number in range(layers)),
        MeanPool(width, classes, dropout),
    )
