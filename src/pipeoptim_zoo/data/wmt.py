"""WMT-16 English-German from tokenised text files: one sentence per line, words or BPE pieces between spaces."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeoptim.errors import ConfigError
from pipeoptim_zoo.data.files import missing
from pipeoptim_zoo.data.losses import label_smoothing, token_accuracy
from pipeoptim_zoo.data.sequences import PairSource
from pipeoptim_zoo.data.task import IndexedTask
from pipeoptim_zoo.data.vocabulary import Vocabulary

__all__ = ["EncodedLines", "wmt16"]

_WHAT = "WMT-16 En-De"
_ORIGIN = "the WMT-16 translation task (or its preparation by Google's seq2seq, which writes *.tok.bpe.32000 files)"
_TRAIN = ("train.tok.clean.bpe.32000", "train")
_VALIDATION = ("newstest2014.tok.bpe.32000", "newstest2013.tok.bpe.32000", "newstest2014", "valid", "validation", "dev")
_VOCABULARY = "vocab.bpe.32000"
_COUNTED_LINES = 1_000_000  # of each language, for a vocabulary of our own
_CHUNK = 1 << 24

Array = npt.NDArray[np.int64]


@dataclass
class EncodedLines:
    """The lines of a text file as ids, read when asked for: gigabytes of text cost 16 bytes a line.

    ``kept`` selects and numbers lines; without it they are all there.
    """

    path: Path
    vocabulary: Vocabulary
    kept: Array | None = None

    @cached_property
    def _bytes(self) -> npt.NDArray[np.uint8]:
        if not self.path.stat().st_size:
            return np.zeros(0, np.uint8)  # an empty file cannot be mapped
        return np.memmap(self.path, dtype=np.uint8, mode="r")

    def _places(self, byte: int) -> Array:
        """Where ``byte`` occurs; chunk by chunk, as the comparison needs a byte for every byte of text."""
        chunks = range(0, len(self._bytes), _CHUNK)
        found = [np.flatnonzero(self._bytes[start : start + _CHUNK] == byte) + start for start in chunks]
        return np.concatenate([np.zeros(0, np.int64), *found]).astype(np.int64)

    @cached_property
    def _ends(self) -> Array:
        ends = self._places(ord("\n"))
        unfinished = len(self._bytes) > (ends[-1] + 1 if len(ends) else 0)
        return np.append(ends, len(self._bytes)) if unfinished else ends

    def all_lines(self) -> int:
        """Lines in the file, kept or not."""
        return len(self._ends)

    def word_counts(self) -> Array:
        """Words of every line, ``[all_lines]``, if single spaces separate them."""
        spaces = np.searchsorted(self._places(ord(" ")), self._ends)
        lengths = np.diff(self._ends, prepend=-1) - 1
        return np.where(lengths > 0, np.diff(spaces, prepend=0) + 1, 0)

    def __len__(self) -> int:
        return len(self._ends) if self.kept is None else len(self.kept)

    def __getitem__(self, number: int, /) -> list[int]:
        line = number if self.kept is None else int(self.kept[number])
        start = int(self._ends[line - 1]) + 1 if line else 0
        return self.vocabulary.encode(self._bytes[start : int(self._ends[line])].tobytes().decode("utf-8").split())


def _find(root: Path, stems: tuple[str, ...], languages: tuple[str, str]) -> tuple[Path, Path]:
    for stem in stems:
        paths = (root / f"{stem}.{languages[0]}", root / f"{stem}.{languages[1]}")
        if paths[0].is_file() and paths[1].is_file():
            return paths
    raise missing(_WHAT, _ORIGIN, root / f"{stems[-1]}.{languages[0]}", f"(or .{languages[1]}, or one of {stems}) is not there")


def _vocabulary(root: Path, train: tuple[Path, Path], size: int) -> Vocabulary:
    published = root / _VOCABULARY
    if published.is_file():
        return Vocabulary.read(published)

    def sentences(path: Path) -> list[list[str]]:
        with path.open(encoding="utf-8") as lines:
            return [line.split() for line in islice(lines, _COUNTED_LINES)]

    return Vocabulary.build((words for path in train for words in sentences(path)), size)


def _pairs(paths: tuple[Path, Path], vocabulary: Vocabulary, s: int, t: int, drop_long: bool) -> PairSource:
    source, target = (EncodedLines(path, vocabulary) for path in paths)
    if source.all_lines() != target.all_lines():
        raise ConfigError(
            f"{paths[0]} has {source.all_lines()} lines and {paths[1]} has {target.all_lines()}; "
            "they must be translations of each other line by line"
        )
    if drop_long:
        sizes = source.word_counts(), target.word_counts()
        fits = (sizes[0] > 0) & (sizes[0] <= s) & (sizes[1] > 0) & (sizes[1] < t)
        source.kept = target.kept = np.flatnonzero(fits)
    return PairSource(source, target, s, t)


def wmt16(
    root: str | Path = "data/wmt16",
    source_length: int = 50,
    target_length: int = 50,
    vocab_size: int = 32_320,
    seed: int = 0,
    languages: tuple[str, str] = ("en", "de"),
) -> IndexedTask:
    """Translation, by default from English to German; x and y as :class:`PairSource` packs them.

    ``root`` holds ``train.tok.clean.bpe.32000.en`` and ``.de`` or ``train.en`` and ``train.de``, and in the
    same way ``newstest2014.tok.bpe.32000``, ``newstest2013.tok.bpe.32000``, ``newstest2014``, ``valid``,
    ``validation`` or ``dev``. Words are what spaces separate; the vocabulary, shared by both languages, is
    ``vocab.bpe.32000`` if that file is there and else the most frequent words of the first million lines
    (``task.vocab_size`` ids). Training pairs with an empty or longer side are left out, validation pairs are
    cut. The files stay on disk.
    Raises ConfigError where files are missing or do not belong together.
    """
    folder = Path(root).expanduser()
    train, validation = (_find(folder, stems, languages) for stems in (_TRAIN, _VALIDATION))
    vocabulary = _vocabulary(folder, train, vocab_size)
    return IndexedTask(
        name="wmt16",
        train=_pairs(train, vocabulary, source_length, target_length, drop_long=True),
        validation=_pairs(validation, vocabulary, source_length, target_length, drop_long=False),
        loss=label_smoothing,
        metrics=token_accuracy,
        origin=f"{' to '.join(languages)}, {train[0]} and {validation[0]}, {len(vocabulary)} words",
        seed=seed,
        vocab_size=len(vocabulary),
    )
