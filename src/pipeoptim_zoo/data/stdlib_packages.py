"""Text classification without a download: which package of the standard library is a snippet from?"""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

import torch
from torch import Tensor

from pipeoptim.errors import ConfigError
from pipeoptim_zoo.data.losses import accuracy, cross_entropy
from pipeoptim_zoo.data.stdlib_text import VOCABULARY, library_files, token_ids
from pipeoptim_zoo.data.task import IndexedTask, TensorSource

__all__ = ["PACKAGES", "packages"]

#: The classes: packages of every Python since 3.11 with at least 150 kB of sources.
PACKAGES = (
    "asyncio",
    "email",
    "encodings",
    "http",
    "importlib",
    "logging",
    "multiprocessing",
    "unittest",
    "urllib",
    "xml",
)
_VALIDATION_PART = 5  # the last fifth of each package's text


def _snippets(root: Path, files: list[Path], context: int, max_bytes: int) -> Tensor:
    """Ids ``[N, context]`` of consecutive pieces of the files' text; 0 is left to padding."""
    text = b""
    for path in files:
        if len(text) >= max_bytes:
            break
        text += (root / path).read_bytes().replace(b"\r\n", b"\n")
    ids = token_ids(text[:max_bytes]).long() + 1
    return ids[: len(ids) // context * context].view(-1, context)


def packages(context: int = 128, seed: int = 0, max_bytes: int = 150_000, root: str | Path | None = None) -> IndexedTask:
    """Snippets of ``context`` characters, x ``[B, context]`` int64, and the number of their package, y ``[B]``.

    ``task.vocab_size`` ids (the characters of ``stdlib_text`` plus one; 0 would be padding), ten classes
    PACKAGES. At most ``max_bytes`` bytes of a package are used; the last fifth of them is for validation.
    ``root`` replaces the standard library's folder. Raises ConfigError where sources are missing or too
    short.

    >>> x, y = packages(context=64, max_bytes=20_000).train_batch(step=0, batch_size=2)
    >>> tuple(x.shape), tuple(y.shape)
    ((2, 64), (2,))
    """
    folder = Path(root or Path(os.__file__).parent)
    files = library_files(folder)
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    labels: tuple[list[Tensor], list[Tensor]] = ([], [])
    for label, name in enumerate(PACKAGES):
        pieces = _snippets(folder, [path for path in files if path.parts[0] == name], context, max_bytes)
        if len(pieces) < _VALIDATION_PART:
            raise ConfigError(
                f"package {name} below {folder} has no {_VALIDATION_PART} snippets of context={context} characters "
                f"in max_bytes={max_bytes}; lower context, raise max_bytes or install Python's full library"
            )
        cut = len(pieces) - len(pieces) // _VALIDATION_PART
        for side, part in enumerate((pieces[:cut], pieces[cut:])):
            sides[side].append(part)
            labels[side].append(torch.full((len(part),), label))
    sources = [TensorSource(torch.cat(x), torch.cat(y)) for x, y in zip(sides, labels, strict=True)]
    fingerprint = hashlib.sha256(b"".join(source.x.numpy().tobytes() for source in sources)).hexdigest()[:12]
    return IndexedTask(
        name="stdlib_packages",
        train=sources[0],
        validation=sources[1],
        loss=cross_entropy,
        metrics=accuracy,
        origin=f"{len(PACKAGES)} packages of the standard library of Python {platform.python_version()} "
        f"(fingerprint {fingerprint}), context {context}",
        seed=seed,
        vocab_size=len(VOCABULARY) + 1,
        classes=len(PACKAGES),
    )
