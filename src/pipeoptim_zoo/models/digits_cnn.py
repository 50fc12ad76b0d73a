"""A small convolutional net for 8x8 digits: BatchNorm and dropout, in seconds on one CPU core.

It exists to exercise what a transformer does not: running statistics that advance in F, and dropout between
stages.
"""

from __future__ import annotations

from torch import nn

__all__ = ["digits_cnn"]


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """3x3 convolution, BatchNorm, ReLU. The convolution needs no bias before a BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def digits_cnn(width: int = 32, classes: int = 10) -> nn.Sequential:
    """Eleven blocks, eight with weights, from ``[B, 1, 8, 8]`` (float32) to logits ``[B, classes]``; channels width to 4 width.

    >>> import torch
    >>> tuple(digits_cnn(width=8)(torch.zeros(2, 1, 8, 8)).shape)
    (2, 10)
    """
    return nn.Sequential(
        _conv(1, width),
        _conv(width, width),
        _conv(width, 2 * width, stride=2),
        _conv(2 * width, 2 * width),
        nn.Dropout2d(0.05),
        _conv(2 * width, 4 * width, stride=2),
        _conv(4 * width, 4 * width),
        _conv(4 * width, 4 * width),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Dropout(0.1),
        nn.Linear(4 * width, classes),
    )
