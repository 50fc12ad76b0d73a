"""GNMT-8 and GNMT-16: recurrent translation models with residual connections and attention.

Source: Wu et al., "Google's Neural Machine Translation System" (2016), in the form of PipeDream's experiments
(Narayanan et al., SOSP 2019): the number counts LSTM layers, half of them in the encoder. As in most code
since ("GNMT v2"), attention is asked by the first decoder layer's output of the same step, not of the step
before, and what it finds is given to all later decoder layers. Attention is additive with a normalised score
vector.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pipeoptim.errors import ConfigError
from pipeoptim_zoo.data.losses import PADDING
from pipeoptim_zoo.models.chain import Chain
from pipeoptim_zoo.models.recurrent import RecurrentLayer, run_lstm

__all__ = ["AttentionLayer", "BidirectionalLayer", "DecoderLayer", "gnmt", "gnmt8", "gnmt16", "reversal"]


class SourceEmbedding(nn.Module):
    """Packed ids ``[B, S + T]`` to (features ``[B, S, width]``, mask ``[B, S]``, target ids ``[B, T]``)."""

    def __init__(self, vocab_size: int, width: int, source_length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, width, padding_idx=PADDING)
        self.source_length = source_length

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        source, target = ids[:, : self.source_length], ids[:, self.source_length :]
        return self.tokens(source), source != PADDING, target.contiguous()


def reversal(mask: Tensor) -> Tensor:
    """Positions ``[B, S]`` that read each sequence backwards and leave the padding behind it in place.

    >>> reversal(torch.tensor([[True, True, True, False]]))
    tensor([[2, 1, 0, 3]])
    """
    where = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    return torch.where(mask, mask.sum(1, keepdim=True) - 1 - where, where)


class BidirectionalLayer(nn.Module):
    """One LSTM layer that reads both ways: ``[B, S, width]`` to ``[B, S, 2 * width]``.

    The backward reading starts at each sequence's last token. (Packed sequences would give the same, but need
    the lengths on the host, which stalls an accelerator at every call.)
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.forwards = nn.LSTM(width, width, batch_first=True)
        self.backwards = nn.LSTM(width, width, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        order = reversal(mask).unsqueeze(-1)
        turned = run_lstm(self.backwards, x.gather(1, order.expand_as(x)))
        back = turned.gather(1, order.expand_as(turned))
        return (torch.cat([run_lstm(self.forwards, x), back], dim=-1), mask, *others)


class Narrow(nn.Module):
    """The second encoder layer: an LSTM from ``2 * width`` to ``width``, so it has no shortcut."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2 * width, width, batch_first=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        return (run_lstm(self.lstm, self.dropout(x)), *others)


class TargetEmbedding(nn.Module):
    """(memory, mask, target ids) to (target features ``[B, T, width]``, memory, mask)."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, width, padding_idx=PADDING)

    def forward(self, memory: Tensor, mask: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.tokens(target), memory, mask


class AttentionLayer(nn.Module):
    """First decoder layer: an LSTM, whose outputs then attend to the encoder's.

    score(q, m) = g * v/|v| . tanh(Wq q + Wm m + b), over the S source positions; (x ``[B, T, width]``, memory
    ``[B, S, width]``, mask ``[B, S]``) to (x, context), both ``[B, T, width]``. Holds ``B * T * S * width``
    numbers.
    """

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.query = nn.Linear(width, width, bias=False)
        self.memory = nn.Linear(width, width, bias=True)
        self.direction = nn.Parameter(torch.empty(width).uniform_(-1, 1))
        self.gain = nn.Parameter(torch.full((1,), 1 / math.sqrt(width)))

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x = run_lstm(self.lstm, self.dropout(x))
        both = self.query(x).unsqueeze(2) + self.memory(memory).unsqueeze(1)
        scores = torch.tanh(both) @ (self.gain * self.direction / self.direction.norm())
        # A finite value: a row of padding alone (an unused slot) must give numbers, not NaN.
        scores = scores.masked_fill(~mask.unsqueeze(1), torch.finfo(scores.dtype).min)
        return x, scores.softmax(-1) @ memory


class DecoderLayer(nn.Module):
    """A later decoder layer: an LSTM over (features, attention context), with a shortcut if ``residual``.

    The ``last`` one does not hand the context on: a stage must not wait for the gradient of an unused tensor.
    """

    def __init__(self, width: int, dropout: float, residual: bool, last: bool) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2 * width, width, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.residual, self.last = residual, last

    def forward(self, x: Tensor, context: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        out = run_lstm(self.lstm, self.dropout(torch.cat([x, context], dim=-1)))
        out = out + x if self.residual else out
        return out if self.last else (out, context)


def gnmt(vocab_size: int, source_length: int, width: int = 1024, layers: int = 8, dropout: float = 0.2) -> Chain:
    """A translation model of ``layers`` LSTM layers, half of them encoder, in ``layers + 3`` blocks.

    Packed ids ``[B, S + T]`` (int64; S = ``source_length`` source ids, then T target ids that start with the
    begin-of-sentence id; 0 is padding, at the end of each part) to logits ``[B, T, vocab_size]`` of the next
    target ids. A packed tensor keeps the input of a pipeline a single tensor. Train it with
    ``pipeoptim_zoo.data.losses.label_smoothing``. All weights start uniform in -0.1 .. 0.1.
    Raises ConfigError if ``layers`` is odd or below 4.

    >>> model = gnmt(vocab_size=20, source_length=5, width=8, layers=4)
    >>> tuple(model(torch.ones(2, 9, dtype=torch.long)).shape)
    (2, 4, 20)
    """
    if layers < 4 or layers % 2:
        raise ConfigError(f"layers={layers} cannot be halved into encoder and decoder; choose 4, 6, 8, ...")
    half = layers // 2
    model = Chain(
        SourceEmbedding(vocab_size, width, source_length),
        BidirectionalLayer(width),
        Narrow(width, dropout),
        *(RecurrentLayer(width, dropout, residual=True) for _ in range(half - 2)),
        TargetEmbedding(vocab_size, width),
        AttentionLayer(width, dropout),
        *(DecoderLayer(width, dropout, number > 0, number == half - 2) for number in range(half - 1)),
        nn.Linear(width, vocab_size),
    )
    for name, weight in model.named_parameters():
        if not name.endswith(("gain", "direction")):
            nn.init.uniform_(weight, -0.1, 0.1)
    return model


def gnmt8(vocab_size: int = 32320, source_length: int = 50, width: int = 1024, dropout: float = 0.2) -> Chain:
    """:func:`gnmt` with eight LSTM layers, four of them in the encoder, in eleven blocks."""
    return gnmt(vocab_size, source_length, width, 8, dropout)


def gnmt16(vocab_size: int = 32320, source_length: int = 50, width: int = 1024, dropout: float = 0.2) -> Chain:
    """:func:`gnmt` with sixteen LSTM layers, eight of them in the encoder, in nineteen blocks."""
    return gnmt(vocab_size, source_length, width, 16, dropout)
