"""AlexNet in one column.

Source: Krizhevsky, "One weird trick for parallelizing convolutional neural networks" (2014).
"""

from __future__ import annotations

from torch import nn

from pipeoptim_zoo.models.chain import Chain
from pipeoptim_zoo.models.image import check_input_size, initialise, scaled

__all__ = ["alexnet"]


def alexnet(input_size: int = 224, classes: int = 1000, width: float = 1.0, dropout: float = 0.5) -> Chain:
    """Eight weight layers in nine blocks, ``[B, 3, input_size, input_size]`` to logits ``[B, classes]``.

    61,100,840 parameters at 224 with 1000 classes. ``width`` multiplies all channels.
    Deviations for 32 and 64: the first convolution has stride ``input_size / 32`` (4 in the published net)
    and the classifier sees 3x3 positions (6x6). Raises ConfigError for another size.

    >>> sum(p.numel() for p in alexnet(input_size=32, classes=10, width=0.125).parameters())
    457010
    """
    small = check_input_size(input_size) < 224
    stride, padding, side = (input_size // 32, 5, 3) if small else (4, 2, 6)
    c1, c2, c3, c4 = (scaled(c, width) for c in (64, 192, 384, 256))
    hidden = scaled(4096, width)

    def pool() -> nn.Module:
        return nn.MaxPool2d(3, stride=2)

    return initialise(
        Chain(
            nn.Sequential(nn.Conv2d(3, c1, 11, stride=stride, padding=padding), nn.ReLU(), pool()),
            nn.Sequential(nn.Conv2d(c1, c2, 5, padding=2), nn.ReLU(), pool()),
            nn.Sequential(nn.Conv2d(c2, c3, 3, padding=1), nn.ReLU()),
            nn.Sequential(nn.Conv2d(c3, c4, 3, padding=1), nn.ReLU()),
            nn.Sequential(nn.Conv2d(c4, c4, 3, padding=1), nn.ReLU(), pool()),
            nn.Sequential(nn.AdaptiveAvgPool2d(side), nn.Flatten()),
            nn.Sequential(nn.Dropout(dropout), nn.Linear(c4 * side * side, hidden), nn.ReLU()),
            nn.Sequential(nn.Dropout(dropout), nn.Linear(hidden, hidden), nn.ReLU()),
            nn.Linear(hidden, classes),
        )
    )
