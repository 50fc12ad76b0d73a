"""The tensors of a sharded checkpoint: one file per process, read by whoever needs a tensor, wherever it lies.

``torch.distributed.checkpoint`` writes and reads such files, too, but its processes tell each other their plans by collectives that
pickle.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from pipeoptim.checkpoint.tensor_file import open_tensors, write_tensors


def write_shard(folder: Path, index: int, count: int, tensors: Mapping[str, Tensor]) -> None:
    """Write the tensors of process ``index`` of ``count``; when this returns they are on the disk."""
    write_tensors(folder / f"shard-{index + 1:05d}-of-{count:05d}.safetensors", tensors)


def shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in the files of ``folder``.

    Raises:
        ConfigError: a file cannot be read.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in _files(folder):
        with open_tensors(path) as file:
            shapes |= {name: file.shape(name) for name in file.names}
    return shapes


def read_tensors(folder: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors ``names``, on the CPU; the rest of the files is not read.

    Raises:
        ConfigError: a file cannot be read.
    """
    wanted, found = set(names), dict[str, Tensor]()
    for path in _files(folder):
        with open_tensors(path) as file:
            found |= {name: file.tensor(name) for name in wanted & file.names}
    return found


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))
