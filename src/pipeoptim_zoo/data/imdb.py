"""IMDb reviews as published: Maas et al., "Learning Word Vectors for Sentiment Analysis" (ACL 2011)."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import torch

from pipeoptim.errors import ConfigError
from pipeoptim_zoo.data.files import find_folder, missing
from pipeoptim_zoo.data.losses import accuracy, cross_entropy
from pipeoptim_zoo.data.sequences import TextSource
from pipeoptim_zoo.data.task import IndexedTask
from pipeoptim_zoo.data.vocabulary import Vocabulary

__all__ = ["imdb", "words"]

ARCHIVE = "aclImdb_v1.tar.gz"
_WHAT, _ORIGIN = "IMDb (Large Movie Review Dataset v1.0)", "the page of its authors at Stanford's AI lab"
_MEMBER = re.compile(r"aclImdb/(train|test)/(neg|pos)/[^/]+\.txt")
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*|[!?.]")

#: (split, label): texts in the order of their file names. Labels: 0 negative, 1 positive.
Texts = dict[tuple[str, int], list[str]]


def words(text: str) -> list[str]:
    """Lower-case words and the marks ! ? . of a review.

    >>> words("It's <br /><br />GOOD!")
    ["it's", 'good', '!']
    """
    return _WORD.findall(text.replace("<br />", " ").lower())


def _from_archive(path: Path) -> Iterator[tuple[str, str]]:
    """Name and text of every review; nothing is unpacked to disk."""
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                found = _MEMBER.fullmatch(member.name.removeprefix("./"))
                content = archive.extractfile(member) if found and member.isfile() else None
                if found and content is not None:
                    yield found.group(), content.read().decode("utf-8")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as an archive ({error}); download it again") from error


def _from_folder(folder: Path) -> Iterator[tuple[str, str]]:
    for path in folder.glob("*/*/*.txt"):
        name = "aclImdb/" + path.relative_to(folder).as_posix()
        if _MEMBER.fullmatch(name):
            yield name, path.read_text(encoding="utf-8")


def _read(root: Path) -> Texts:
    archives = [path for path in (root, root / ARCHIVE) if path.is_file()]
    found = _from_archive(archives[0]) if archives else _from_folder(find_folder(root, "aclImdb", "train", _WHAT, _ORIGIN))
    texts: Texts = {(split, label): [] for split in ("train", "test") for label in (0, 1)}
    for name, text in sorted(found):
        _, split, side, _ = name.split("/")
        texts[split, int(side == "pos")].append(text)
    for (split, label), reviews in texts.items():
        if not reviews:
            raise missing(_WHAT, _ORIGIN, root / "aclImdb" / split / ("neg", "pos")[label], "has no .txt file")
    return texts


def imdb(root: str | Path = "data", context: int = 256, vocab_size: int = 20_000, seed: int = 0) -> IndexedTask:
    """Is a review positive? 25,000 reviews for training, 25,000 (the published test set) for validation.

    x ``[B, context]`` int64: the first ``context`` words, padded with 0 behind; y ``[B]``, 1 for positive.
    The vocabulary is that of the training reviews, at most ``vocab_size`` with four special ids
    (``task.vocab_size``). ``root`` is the folder that holds ``aclImdb`` or ``aclImdb_v1.tar.gz``, or that
    archive itself. Reading it takes some seconds. Raises ConfigError where it is missing or damaged.
    """
    path = Path(root).expanduser()
    tokens = {key: [words(text) for text in reviews] for key, reviews in _read(path).items()}
    vocabulary = Vocabulary.build(tokens["train", 0] + tokens["train", 1], vocab_size)

    def source(split: str) -> TextSource:
        negative, positive = tokens[split, 0], tokens[split, 1]
        labels = torch.tensor([0] * len(negative) + [1] * len(positive))
        return TextSource([vocabulary.encode(t[:context]) for t in negative + positive], labels, context)

    return IndexedTask(
        name="imdb",
        train=source("train"),
        validation=source("test"),
        loss=cross_entropy,
        metrics=accuracy,
        origin=f"IMDb reviews in {path}, {len(vocabulary)} words, context {context}",
        seed=seed,
        vocab_size=len(vocabulary),
        classes=2,
    )
