"""Sequences of ids as rectangular tensors: padded texts, and packed sentence pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pipeoptim_zoo.data.losses import IGNORE, PADDING
from pipeoptim_zoo.data.vocabulary import BEGIN, END

__all__ = ["Lines", "OneLineSource", "PairSource", "TextSource"]


class Lines(Protocol):
    """Numbered sequences of ids, in memory or read when asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Sequence[int]: ...


def _fill(row: Tensor, ids: Sequence[int]) -> None:
    row[: len(ids)] = torch.tensor(ids, dtype=torch.int64)


@dataclass(frozen=True)
class TextSource:
    """Texts with a label: x ``[B, context]`` (cut at ``context``, padded behind), y ``[B]``."""

    texts: Lines
    labels: Tensor
    context: int

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        x = torch.full((len(indices), self.context), PADDING, dtype=torch.int64)
        for row, number in zip(x, indices.tolist(), strict=True):
            _fill(row, self.texts[number][: self.context])
        return x, self.labels[indices]


@dataclass(frozen=True)
class PairSource:
    """Sentence pairs: x ``[B, S + T]`` packs the source and the target input, y ``[B, T]`` is the target.

    With source s1..sm and target t1..tn: x = s1..sm, padding | BEGIN t1..tn, padding; y = t1..tn END, IGNORE.
    Longer sentences are cut at S = ``source_length`` and T = ``target_length``.
    """

    sources: Lines
    targets: Lines
    source_length: int
    target_length: int

    def __len__(self) -> int:
        return len(self.sources)

    def batch(self, indices: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        s, t = self.source_length, self.target_length
        x = torch.full((len(indices), s + t), PADDING, dtype=torch.int64)
        y = torch.full((len(indices), t), IGNORE, dtype=torch.int64)
        for row, number in enumerate(indices.tolist()):
            target = list(self.targets[number][: t - 1])
            _fill(x[row, :s], self.sources[number][:s])
            _fill(x[row, s:], [BEGIN, *target])
            _fill(y[row], [*target, END])
        return x, y


class OneLineSource(PairSource):
    """The same pairs for a model of one sequence, such as ``gpt``: y ``[B, S + T]`` ignores what is predicted of the source."""

    def batch(self, indices: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        x, y = super().batch(indices, generator)
        return x, torch.cat([torch.full_like(x[:, : self.source_length], IGNORE), y], dim=1)
