"""CIFAR-100 as published: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009)."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeoptim.errors import ConfigError
from pipeoptim_zoo.data.files import find_folder
from pipeoptim_zoo.data.images import ImageSource, Transform
from pipeoptim_zoo.data.losses import accuracy, auxiliary_cross_entropy
from pipeoptim_zoo.data.task import IndexedTask

__all__ = ["cifar100", "load_arrays"]

_MEAN, _STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding!r} does not belong in a data file")
    return text.encode("latin1")


_ARRAYS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],  # type: ignore[dict-item]
    ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],  # type: ignore[dict-item]
    ("_codecs", "encode"): _latin1,  # how Python 3 writes bytes into an old pickle
}


class _ArrayUnpickler(pickle.Unpickler):
    """Reads numbers, text, containers and numpy arrays; anything else (which could run code) is refused."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ARRAYS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} does not belong in a data file") from None


def load_arrays(path: Path) -> dict[str, Any]:
    """The dictionary pickled in ``path``, with text keys. ConfigError if the file holds anything but data."""
    try:
        content = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        return {key.decode() if isinstance(key, bytes) else str(key): value for key, value in content.items()}
    except Exception as error:  # a damaged pickle can raise anything
        raise ConfigError(f"{path} is not a pickle of arrays ({error}); download it again") from error


def _source(path: Path, transform: Transform) -> ImageSource:
    content = load_arrays(path)
    try:
        pixels = torch.from_numpy(np.ascontiguousarray(content["data"])).view(-1, 3, 32, 32)
        labels = torch.tensor(content["fine_labels"], dtype=torch.int64)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} has not CIFAR-100's layout ({error}); download it again") from error
    return ImageSource(pixels.__getitem__, labels, transform)


def cifar100(root: str | Path = "data", seed: int = 0, augment: bool = True, input_size: int | None = None) -> IndexedTask:
    """100 classes of 32x32 images: 50,000 for training, 10,000 (the published test set) for validation.

    Images ``[B, 3, S, S]`` float32, normalised, S = ``input_size`` or 32; labels ``[B]``. ``augment``: shifts
    by up to 4 pixels and mirroring. Needs the folder ``cifar-100-python`` (files ``train`` and ``test``) in
    ``root`` and raises ConfigError where it is missing or damaged. The pickles are read without running any
    code in them.
    """
    folder = find_folder(
        root, "cifar-100-python", "train", "CIFAR-100 (python version)", "the CIFAR page of the University of Toronto"
    )
    return IndexedTask(
        name="cifar100",
        train=_source(folder / "train", Transform(_MEAN, _STD, 4 if augment else 0, input_size)),
        validation=_source(folder / "test", Transform(_MEAN, _STD, 0, input_size)),
        loss=auxiliary_cross_entropy,
        metrics=accuracy,
        origin=f"CIFAR-100 in {folder}",
        seed=seed,
        classes=100,
    )
