"""Text that is on every machine: the sources of Python's own standard library, as a stream of characters.

Real text of megabytes, no download, no extra dependency. It differs a little between Python versions, so
``describe()`` states the version and a fingerprint: compare runs only where both are equal.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeoptim.errors import ConfigError
from pipeoptim_zoo.data.losses import cross_entropy, token_accuracy
from pipeoptim_zoo.data.task import IndexedTask

__all__ = ["VOCABULARY", "Windows", "chars", "decode", "library_files", "token_ids"]

#: Character of each id, the last one for every other byte. Fixed: a model has the same shape on every Python.
VOCABULARY = "\n\t" + "".join(map(chr, range(32, 127))) + "\N{REPLACEMENT CHARACTER}"
_IDS = bytes(VOCABULARY.find(chr(byte)) if chr(byte) in VOCABULARY[:-1] else len(VOCABULARY) - 1 for byte in range(256))
_SKIP = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "lib2to3",
    "turtledemo",
}
VALIDATION_PART = 16  # one byte in sixteen, in files of its own
MAX_FILE_BYTES = 32_768  # of one file: without it a single large table could be most of the validation text


@dataclass(frozen=True)
class Windows:
    """Overlapping windows of a token stream: x = tokens[i .. i+context), y = the same one later.

    Window n starts at ``n * context``, plus a random 0 .. context-1 in training, so that every token is met
    at every position. ``tokens`` is uint8 ``[N]``; batches are int64 ``[B, context]``.
    """

    tokens: Tensor
    context: int
    jitter: bool

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1) // self.context - self.jitter)

    def batch(self, indices: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        starts = indices * self.context
        if self.jitter:
            starts = starts + torch.randint(self.context, starts.shape, generator=generator)
        windows = self.tokens[starts[:, None] + torch.arange(self.context + 1)].long()
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def library_files(root: str | Path | None = None) -> list[Path]:
    """Paths (relative to ``root``) of the library's own modules, in an order that a cap does not bias.

    Raises ConfigError where there are no sources (a zipped or stripped standard library).
    """
    root = Path(root or Path(os.__file__).parent)
    found = [path.relative_to(root) for path in _walk(root)]
    if not found:
        raise ConfigError(
            f"no .py file of the standard library below {root} (zipped or stripped Python?); "
            "use a Python with its sources installed, or another data set"
        )
    return sorted(found, key=_digest)


def _walk(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIP and not name.startswith("config-")]
        yield from (Path(folder, name) for name in files if name.endswith(".py"))


def _digest(path: Path) -> bytes:
    return hashlib.sha256(path.as_posix().encode()).digest()


@lru_cache(maxsize=4)
def _load(root: Path, max_bytes: int) -> tuple[bytes, bytes, int, str]:
    """Training text, validation text, number of files, fingerprint. The first files are for validation."""
    budgets = [max_bytes // VALIDATION_PART, max_bytes - max_bytes // VALIDATION_PART]
    parts: list[list[bytes]] = [[], []]
    for path in library_files(root):
        side = 0 if budgets[0] > 0 else 1
        if budgets[side] <= 0:
            break
        text = (root / path).read_bytes().replace(b"\r\n", b"\n")[: min(MAX_FILE_BYTES, budgets[side])]
        parts[side].append(text)
        budgets[side] -= len(text)
    validation, train = (b"".join(part) for part in parts)
    fingerprint = hashlib.sha256(train + b"\0" + validation).hexdigest()[:12]
    return train, validation, len(parts[0]) + len(parts[1]), fingerprint


def token_ids(text: bytes) -> Tensor:
    """Ids of a text, uint8 ``[N]``."""
    return torch.from_numpy(np.frombuffer(bytearray(text.translate(_IDS)), dtype=np.uint8))


def decode(ids: Tensor) -> str:
    """The text of ids ``[T]``.

    >>> decode(torch.tensor([72, 75, 0])) == "fi" + chr(10)
    True
    """
    return "".join(VOCABULARY[int(i)] for i in ids)


def chars(context: int, seed: int = 0, max_bytes: int = 4_000_000, root: str | Path | None = None) -> IndexedTask:
    """Next-character prediction on the standard library: x and y are ``[B, context]`` int64.

    Ids are below ``len(VOCABULARY)``. A file is either in the training or in the validation text; together
    they hold at most ``max_bytes`` bytes. ``root`` replaces the standard library's folder by another folder
    of .py files.

    Raises ConfigError where no sources are found, or they hold less than a window.

    >>> x, y = chars(context=16, max_bytes=200_000).train_batch(step=0, batch_size=2)
    >>> bool((x[:, 1:] == y[:, :-1]).all())
    True
    """
    train, validation, files, fingerprint = _load(Path(root or Path(os.__file__).parent), max_bytes)
    if context < 1 or min(len(train), len(validation)) < 2 * context + 1:
        raise ConfigError(
            f"context={context} with max_bytes={max_bytes} leaves no window (training text {len(train)}, "
            f"validation text {len(validation)} bytes); lower context or raise max_bytes"
        )
    return IndexedTask(
        name="stdlib_text",
        train=Windows(token_ids(train), context, jitter=True),
        validation=Windows(token_ids(validation), context, jitter=False),
        loss=cross_entropy,
        metrics=token_accuracy,
        origin=f"{len(train) + len(validation)} bytes of {files} files of the standard library of Python "
        f"{platform.python_version()} (fingerprint {fingerprint}), context {context}",
        seed=seed,
        vocab_size=len(VOCABULARY),
    )
