"""CIFAR-100 as published: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from pipeoptim.errors import ConfigError
from pipeoptim_zoo.data.files import find_folder
from pipeoptim_zoo.data.images import ImageSource, Transform
from pipeoptim_zoo.data.losses import accuracy, auxiliary_cross_entropy
from pipeoptim_zoo.data.task import IndexedTask

__all__ = ["cifar100"]

_MEAN, _STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)

# One image of the binary version: the number of its superclass, that of its class, and 32 x 32 bytes each of red, green and blue.
_RECORD = 2 + 3 * 32 * 32


def _read_records(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Images ``[N, 3, 32, 32]`` uint8 and their classes ``[N]``, of a file that is nothing but records."""
    content = np.fromfile(path, dtype=np.uint8)
    if not content.size or content.size % _RECORD:
        raise ConfigError(
            f"{path} has {content.size:,} bytes, must be a multiple of {_RECORD:,} (one image of CIFAR-100's binary version); "
            "download it again"
        )
    records = torch.from_numpy(content).view(-1, _RECORD)
    labels = records[:, 1].long()
    if labels.max() > 99:
        raise ConfigError(f"{path} has a label {int(labels.max())}, CIFAR-100's are 0 .. 99; download it again")
    return records[:, 2:].reshape(-1, 3, 32, 32), labels


def _source(path: Path, transform: Transform) -> ImageSource:
    if not path.is_file():
        raise ConfigError(f"{path} is missing; unpack the archive of CIFAR-100's binary version again")
    pixels, labels = _read_records(path)
    return ImageSource(pixels.__getitem__, labels, transform)


def cifar100(root: str | Path = "data", seed: int = 0, augment: bool = True, input_size: int | None = None) -> IndexedTask:
    """100 classes of 32x32 images: 50,000 for training, 10,000 (the published test set) for validation.

    Images ``[B, 3, S, S]`` float32, normalised, S = ``input_size`` or 32; labels ``[B]``. ``augment``: shifts
    by up to 4 pixels and mirroring. Needs the folder ``cifar-100-binary`` (files ``train.bin`` and ``test.bin``)
    in ``root`` and raises ConfigError where it is missing or damaged. The binary version is read, not the one
    for Python: that one consists of pickles, which can run code.
    """
    folder = find_folder(
        root, "cifar-100-binary", "train.bin", "CIFAR-100 (binary version)", "the CIFAR page of the University of Toronto"
    )
    return IndexedTask(
        name="cifar100",
        train=_source(folder / "train.bin", Transform(_MEAN, _STD, 4 if augment else 0, input_size)),
        validation=_source(folder / "test.bin", Transform(_MEAN, _STD, 0, input_size)),
        loss=auxiliary_cross_entropy,
        metrics=accuracy,
        origin=f"CIFAR-100 in {folder}",
        seed=seed,
        classes=100,
    )
