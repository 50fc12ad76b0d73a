"""Images as uint8, and what happens to them on the way into a batch: crop, flip, resize, normalise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["ImageSource", "Transform", "random_crop_and_flip"]


def random_crop_and_flip(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to ``padding`` pixels (zeros come in) and mirrored with probability 1/2.

    ``[B, C, H, W]`` to the same, any dtype. All randomness comes from ``generator``.
    """
    count, channels, height, width = images.shape
    padded = functional.pad(images, (padding,) * 4)
    top, left = torch.randint(2 * padding + 1, (2, count, 1), generator=generator)
    flip = torch.randint(2, (count, 1), generator=generator).bool()
    rows, columns = torch.arange(height) + top, torch.arange(width).expand(count, width)
    columns = torch.where(flip, width - 1 - columns, columns) + left
    batch = torch.arange(count).view(-1, 1, 1, 1)
    channel = torch.arange(channels).view(1, -1, 1, 1)
    return padded[batch, channel, rows[:, None, :, None], columns[:, None, None, :]]


@dataclass(frozen=True)
class Transform:
    """uint8 ``[B, 3, H, W]`` to float32, per channel ``(x / 255 - mean) / std``, at ``input_size`` if given.

    In training (a generator is given) images are shifted by up to ``padding`` pixels and mirrored before.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int = 0
    input_size: int | None = None

    def __call__(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        if generator is not None and self.padding:
            images = random_crop_and_flip(images, self.padding, generator)
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (self.mean, self.std))
        x = (images.float() / 255 - mean) / std
        if self.input_size not in (None, x.shape[-1]):
            x = functional.interpolate(x, size=self.input_size, mode="bilinear", antialias=True)
        return x


@dataclass(frozen=True)
class ImageSource:
    """Images that ``read(number)`` yields as uint8 ``[3, H, W]``, with their labels ``[N]``."""

    read: Callable[[int], Tensor]
    labels: Tensor
    transform: Transform

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        images = torch.stack([self.read(int(i)) for i in indices])
        return self.transform(images, generator), self.labels[indices]
