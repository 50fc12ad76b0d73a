"""Finding a data set on disk, and saying what to do where it is not."""

from __future__ import annotations

from pathlib import Path

from pipeoptim.errors import ConfigError

__all__ = ["find_folder", "missing"]


def missing(what: str, source: str, where: Path, problem: str = "is not there") -> ConfigError:
    """The error for absent data: which data set, where it comes from, and which path must exist.

    >>> print(missing("CIFAR-100", "the CIFAR page of the University of Toronto", Path("data/cifar-100-binary")))
    CIFAR-100: data/cifar-100-binary is not there; download it from the CIFAR page of the University of \
Toronto and unpack it so that this path exists
    """
    return ConfigError(f"{what}: {where} {problem}; download it from {source} and unpack it so that this path exists")


def find_folder(root: str | Path, name: str, marker: str, what: str, source: str) -> Path:
    """``root/name`` or ``root`` itself, whichever holds ``marker``; ConfigError if neither does."""
    root = Path(root).expanduser()
    for folder in (root / name, root):
        if (folder / marker).exists():
            return folder
    raise missing(what, source, root / name / marker)
