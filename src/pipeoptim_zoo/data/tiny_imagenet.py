"""Tiny-ImageNet as published for Stanford's CS231n: 200 classes, 64x64 JPEG files in folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeoptim.errors import ConfigError
from pipeoptim_zoo.data.files import find_folder, missing
from pipeoptim_zoo.data.images import ImageSource, Transform
from pipeoptim_zoo.data.losses import accuracy, auxiliary_cross_entropy
from pipeoptim_zoo.data.task import IndexedTask

__all__ = ["JpegFiles", "tiny_imagenet"]

_MEAN, _STD = (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)
_WHAT, _ORIGIN = "Tiny-ImageNet", "the Tiny-ImageNet page of Stanford's CS231n course (tiny-imagenet-200.zip)"
SIDE = 64


class JpegFiles:
    """Image files, decoded when asked for: ``files(i)`` is uint8 ``[3, 64, 64]``, grey images as three channels.

    ``cache`` keeps every decoded image (12 kB each, 1.2 GB for the training set).
    """

    def __init__(self, paths: Sequence[Path], cache: bool) -> None:
        try:
            from PIL import Image
        except ImportError as error:
            raise ConfigError("Tiny-ImageNet's JPEG files need Pillow: pip install pillow") from error
        self._open = Image.open
        self.paths = paths
        self._known: dict[int, Tensor] | None = {} if cache else None

    def __call__(self, number: int) -> Tensor:
        if self._known is not None and number in self._known:
            return self._known[number]
        try:
            with self._open(self.paths[number]) as image:
                pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
        except OSError as error:
            raise ConfigError(f"{self.paths[number]} cannot be read ({error}); unpack the data set again") from error
        if pixels.shape != (3, SIDE, SIDE):
            raise ConfigError(f"{self.paths[number]} is {tuple(pixels.shape)}, not 64x64; is it Tiny-ImageNet?")
        if self._known is not None:
            self._known[number] = pixels
        return pixels


def _train_files(folder: Path, classes: Sequence[str]) -> tuple[list[Path], list[int]]:
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted((folder / "train" / name / "images").glob("*.JPEG"))
        if not found:
            raise missing(_WHAT, _ORIGIN, folder / "train" / name / "images", "has no .JPEG file")
        paths += found
        labels += [label] * len(found)
    return paths, labels


def _validation_files(folder: Path, classes: Sequence[str]) -> tuple[list[Path], list[int]]:
    annotations = folder / "val" / "val_annotations.txt"
    if not annotations.exists():
        raise missing(_WHAT, _ORIGIN, annotations)
    number = {name: label for label, name in enumerate(classes)}
    rows = [line.split("\t") for line in annotations.read_text().splitlines() if line.strip()]
    try:
        return [folder / "val" / "images" / row[0] for row in rows], [number[row[1]] for row in rows]
    except (IndexError, KeyError) as error:
        raise ConfigError(f"{annotations}: {error} is not 'file, class, box'; unpack the data set again") from error


def tiny_imagenet(
    root: str | Path = "data",
    seed: int = 0,
    augment: bool = True,
    input_size: int | None = None,
    cache: bool = False,
) -> IndexedTask:
    """200 classes of 64x64 images: 100,000 for training, 10,000 for validation.

    Images ``[B, 3, S, S]`` float32, normalised, S = ``input_size`` or 64; labels ``[B]`` in the order of
    ``wnids.txt``. ``augment``: shifts by up to 8 pixels and mirroring. Needs the folder ``tiny-imagenet-200``
    in ``root`` (``wnids.txt``, ``train/*/images/*.JPEG``, ``val/val_annotations.txt``, ``val/images``) and
    raises ConfigError where it is missing. Files are decoded batch by batch; ``cache`` keeps them in memory.
    """
    folder = find_folder(root, "tiny-imagenet-200", "wnids.txt", _WHAT, _ORIGIN)
    classes = (folder / "wnids.txt").read_text().split()

    def source(files: tuple[list[Path], list[int]], padding: int) -> ImageSource:
        paths, labels = files
        return ImageSource(JpegFiles(paths, cache), torch.tensor(labels), Transform(_MEAN, _STD, padding, input_size))

    return IndexedTask(
        name="tiny_imagenet",
        train=source(_train_files(folder, classes), 8 if augment else 0),
        validation=source(_validation_files(folder, classes), 0),
        loss=auxiliary_cross_entropy,
        metrics=accuracy,
        origin=f"Tiny-ImageNet in {folder}",
        seed=seed,
        classes=len(classes),
    )
