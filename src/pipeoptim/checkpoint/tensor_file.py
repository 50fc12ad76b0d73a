"""Tensors in a safetensors file, with the order in which their elements lie in memory. Nothing in it is ever pickled.

A safetensors file knows shapes but no strides. A tensor whose elements lie in memory in another order than that of its dimensions
(channels last, a transposed weight) is written in the order of memory, and its shape and strides are noted beside it: a kernel that
steps a weight and its state in one pass needs both in the same order, also after a resume.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeoptim.errors import ConfigError
from pipeoptim.files import sync_path

_REORDERED = "reordered"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write them and ``metadata``; when this returns they are on the disk.

    Raises:
        OSError: no space, no permission.
    """
    stored: dict[str, Tensor] = {}
    reordered: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        if _is_reordered(tensor):
            reordered[name] = tuple(tensor.shape), tensor.stride()
            # as_strided over the tensor's memory: no copy, elements in the order in which they lie.
            dense = tensor.detach().as_strided((tensor.numel(),), (1,))
        else:
            dense = tensor.detach().contiguous()
        start = dense.untyped_storage().data_ptr()
        stored[name] = dense.clone() if start in taken else dense  # safetensors refuses two names for one memory
        taken.add(start)
    save_tensors(path, stored, {**(metadata or {}), _REORDERED: json.dumps(reordered)})
    sync_path(path)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """As safetensors does it, for other tools to read; with the mode that any new file gets: safetensors makes it its owner's alone.

    Raises:
        OSError: no space, no permission.
    """
    path.touch()
    mode = path.stat().st_mode & 0o777  # as the umask and the folder have it
    try:
        save_file(dict(tensors), path, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:  # it has the system's reason in its words only
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    path.chmod(mode)


class TensorFile:
    """An open file of tensors, which are read when they are asked for. Made by :func:`open_tensors`.

    Attributes:
        names: of the tensors.
        metadata: as it was given to :func:`write_tensors`.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        self.names = set(file.keys())
        self.metadata: dict[str, str] = dict(file.metadata() or {})
        self._reordered: dict[str, tuple[list[int], list[int]]] = json.loads(self.metadata.pop(_REORDERED, "{}"))

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, without reading it."""
        return tuple(self._reordered[name][0] if name in self._reordered else self._file.get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        """A tensor, on the CPU, with the strides that it had."""
        found: Tensor = self._file.get_tensor(name)
        return found.as_strided(*self._reordered[name]) if name in self._reordered else found


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """The file ``path``, open.

    Raises:
        ConfigError: it cannot be read, or is no such file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield TensorFile(file)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        if isinstance(error, ConfigError):
            raise
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"{path} is no file of a checkpoint ({said}); choose another checkpoint") from error


def _is_reordered(tensor: Tensor) -> bool:
    """Whether its elements lie in memory without gaps, but not in the order of its dimensions."""
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=strides.__getitem__, reverse=True)
    return not tensor.is_contiguous() and tensor.permute(order).is_contiguous()
