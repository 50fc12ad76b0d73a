"""Words and their numbers: the most frequent ones of the training text, after four special ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pipeoptim_zoo.data.losses import PADDING

__all__ = ["BEGIN", "END", "SPECIALS", "UNKNOWN", "Vocabulary"]

UNKNOWN, BEGIN, END = 1, 2, 3
SPECIALS = ("<pad>", "<unk>", "<s>", "</s>")
assert SPECIALS[PADDING] == "<pad>"


@dataclass(frozen=True)
class Vocabulary:
    """``words[i]`` is the word of id i; the first four are SPECIALS.

    >>> words = Vocabulary.build([["b", "a", "b"], ["c"]], size=6)
    >>> words.words[4:], words.encode(["a", "b", "z"]), words.decode([4, 5, 3, 4])
    (('b', 'a'), [5, 4, 1], ['b', 'a'])
    """

    words: tuple[str, ...]

    @classmethod
    def build(cls, sentences: Iterable[Iterable[str]], size: int) -> Vocabulary:
        """The ``size - 4`` most frequent words; equally frequent ones in alphabetical order."""
        counts: Counter[str] = Counter()
        for sentence in sentences:
            counts.update(sentence)
        for special in SPECIALS:
            counts.pop(special, None)
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(SPECIALS + tuple(ranked[: max(0, size - len(SPECIALS))]))

    @classmethod
    def read(cls, path: Path) -> Vocabulary:
        """One word per line, as published beside tokenised corpora; its own special words are replaced."""
        words = dict.fromkeys(path.read_text(encoding="utf-8").split("\n"))
        return cls(SPECIALS + tuple(word for word in words if word and word not in {*SPECIALS, "<\\s>"}))

    def __len__(self) -> int:
        return len(self.words)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.words)}

    def encode(self, words: Iterable[str]) -> list[int]:
        """Ids of ``words``, UNKNOWN for those that the vocabulary lacks."""
        ids = self._ids
        return [ids.get(word, UNKNOWN) for word in words]

    def decode(self, ids: Sequence[int]) -> list[str]:
        """Words up to the first END, without padding and BEGIN."""
        ids = list(ids)
        ids = ids[: ids.index(END)] if END in ids else ids
        return [self.words[number] for number in ids if number not in (PADDING, BEGIN)]
