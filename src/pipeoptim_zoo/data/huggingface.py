"""Any data set that Hugging Face's ``datasets`` can load, as a Task. An extra: ``pip install datasets``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeoptim.errors import ConfigError
from pipeoptim_zoo.data.images import ImageSource, Transform
from pipeoptim_zoo.data.imdb import words
from pipeoptim_zoo.data.losses import accuracy, auxiliary_cross_entropy, cross_entropy, label_smoothing, token_accuracy
from pipeoptim_zoo.data.sequences import PairSource, TextSource
from pipeoptim_zoo.data.task import IndexedTask
from pipeoptim_zoo.data.vocabulary import Vocabulary
from pipeoptim_zoo.hub import from_hub

__all__ = ["VALIDATION", "images", "load", "texts", "translation"]

VALIDATION = ("validation", "valid", "val", "dev", "test")
"""Names of the split that is held out, the likeliest first."""
_COUNTED_ROWS = 200_000  # for the vocabulary of a translation


def load(path: str | Path, name: str | None = None) -> dict[str, Any]:
    """Splits of a data set: a name on the hub, a folder written by ``save_to_disk``, or a folder of files.

    Data sets that bring their own code are not run. Raises ConfigError where ``datasets`` or the data is
    missing.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(f"data set {path} needs the package datasets: pip install datasets") from error
    try:
        if (Path(path) / "dataset_dict.json").exists():
            return dict(datasets.load_from_disk(str(path)))
        with from_hub("data set", path):
            return dict(datasets.load_dataset(str(path), name))
    except ConfigError:
        raise
    except Exception as error:  # the hub's, the network's and the file system's errors have no common base
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        absent = "" if Path(path).exists() else "is no folder here, and "
        raise ConfigError(
            f"data set {path} {absent}cannot be loaded ({reason}); download it with datasets.load_dataset on a machine with "
            "a network, save it with save_to_disk and give that folder"
        ) from error


def _splits(path: str | Path, name: str | None, validation: str | None) -> tuple[Any, Any]:
    splits = load(path, name)
    found = next((split for split in ((validation,) if validation else VALIDATION) if split in splits), None)
    if "train" not in splits or found is None:
        raise ConfigError(f"data set {path} has splits {sorted(splits)}; it needs train and one of {VALIDATION}")
    return splits["train"], splits[found]


def _column(split: Any, wanted: str | None, usual: Sequence[str], path: str | Path) -> str:
    names = split.column_names
    column = wanted if wanted is not None else next((name for name in usual if name in names), None)
    if column not in names:
        raise ConfigError(f"data set {path} has columns {names}, not {wanted or usual}; name the column to use")
    return str(column)


def _labels(split: Any, column: str, path: str | Path) -> Tensor:
    try:
        return torch.tensor(split[column][:], dtype=torch.int64)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"column {column} of data set {path} is not of class numbers ({error})") from error


def _pixels(split: Any, column: str) -> Callable[[int], Tensor]:
    def read(number: int) -> Tensor:
        image = split[number][column].convert("RGB")
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    return read


def images(
    path: str | Path,
    input_size: int | None = None,
    seed: int = 0,
    padding: int = 4,
    name: str | None = None,
    image: str | None = None,
    label: str | None = None,
    validation: str | None = None,
) -> IndexedTask:
    """Image classification: x ``[B, 3, S, S]`` float32, normalised to mean 0.5 and deviation 0.25; y ``[B]``.

    All images must have one size. In training they are shifted by up to ``padding`` pixels and mirrored; 0
    turns both off. ``image`` and ``label`` name the columns (usual names are found), ``validation`` the
    split.
    """
    splits = _splits(path, name, validation)
    image = _column(splits[0], image, ("image", "img"), path)
    label = _column(splits[0], label, ("label", "fine_label", "labels"), path)
    labels = [_labels(split, label, path) for split in splits]
    half, quarter = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    train, held_out = (
        ImageSource(_pixels(split, image), y, Transform(half, quarter, shift, input_size))
        for split, y, shift in zip(splits, labels, (padding, 0), strict=True)
    )
    return IndexedTask(
        name=Path(path).name,
        train=train,
        validation=held_out,
        loss=auxiliary_cross_entropy,
        metrics=accuracy,
        origin=f"Hugging Face datasets, {path}",
        seed=seed,
        classes=int(torch.cat(labels).max()) + 1,
    )


def texts(
    path: str | Path,
    context: int = 256,
    vocab_size: int = 20_000,
    seed: int = 0,
    name: str | None = None,
    text: str | None = None,
    label: str | None = None,
    validation: str | None = None,
) -> IndexedTask:
    """Text classification: x ``[B, context]`` ids of words, padded with 0 behind; y ``[B]``. As ``imdb``."""
    splits = _splits(path, name, validation)
    text = _column(splits[0], text, ("text", "sentence", "content"), path)
    label = _column(splits[0], label, ("label", "labels"), path)
    tokens = [[words(line) for line in split[text]] for split in splits]
    vocabulary = Vocabulary.build(tokens[0], vocab_size)
    labels = [_labels(split, label, path) for split in splits]
    train, held_out = (
        TextSource([vocabulary.encode(line[:context]) for line in lines], y, context)
        for lines, y in zip(tokens, labels, strict=True)
    )
    return IndexedTask(
        name=Path(path).name,
        train=train,
        validation=held_out,
        loss=cross_entropy,
        metrics=accuracy,
        origin=f"Hugging Face datasets, {path}, {len(vocabulary)} words",
        seed=seed,
        vocab_size=len(vocabulary),
        classes=int(torch.cat(labels).max()) + 1,
    )


class _Sentences:
    """One language of a translation column, as ids."""

    def __init__(self, split: Any, column: str, language: str, vocabulary: Vocabulary) -> None:
        self.split, self.column, self.language, self.vocabulary = split, column, language, vocabulary

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, number: int, /) -> list[int]:
        return self.vocabulary.encode(self.split[number][self.column][self.language].split())


def translation(
    path: str | Path,
    languages: tuple[str, str] = ("en", "de"),
    source_length: int = 50,
    target_length: int = 50,
    vocab_size: int = 32_320,
    seed: int = 0,
    name: str | None = None,
    column: str = "translation",
    validation: str | None = None,
) -> IndexedTask:
    """Translation from a column of {language: sentence}; x and y as ``PairSource`` packs them.

    Words are what spaces separate; the vocabulary is that of the first 200,000 training pairs. Longer
    sentences are cut.
    """
    splits = _splits(path, name, validation)
    column = _column(splits[0], column, (), path)
    rows = islice(splits[0], _COUNTED_ROWS)
    try:
        vocabulary = Vocabulary.build((row[column][lang].split() for row in rows for lang in languages), vocab_size)
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"column {column} of data set {path} has no sentences in {languages} ({error!r})") from error
    train, held_out = (
        PairSource(
            _Sentences(split, column, languages[0], vocabulary),
            _Sentences(split, column, languages[1], vocabulary),
            source_length,
            target_length,
        )
        for split in splits
    )
    return IndexedTask(
        name=Path(path).name,
        train=train,
        validation=held_out,
        loss=label_smoothing,
        metrics=token_accuracy,
        origin=f"Hugging Face datasets, {path}, {' to '.join(languages)}, {len(vocabulary)} words",
        seed=seed,
        vocab_size=len(vocabulary),
    )
