"""ResNets of bottleneck blocks: He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from pipeoptim_zoo.models.chain import Chain
from pipeoptim_zoo.models.image import check_input_size, conv_norm, initialise, scaled

__all__ = ["Bottleneck", "resnet", "resnet50", "resnet101"]

_EPS = 1e-5
_EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut, projected where the shape changes.

    Deviation from the paper, as in most code since: the stride is in the 3x3 convolution ("v1.5").
    """

    def __init__(self, inputs: int, middle: int, stride: int) -> None:
        super().__init__()
        outputs = _EXPANSION * middle
        self.reduce = conv_norm(inputs, middle, 1, eps=_EPS)
        self.conv = conv_norm(middle, middle, 3, stride, padding=1, eps=_EPS)
        self.expand = conv_norm(middle, outputs, 1, eps=_EPS)[:2]
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = conv_norm(inputs, outputs, 1, stride, eps=_EPS)[:2]

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.expand(self.conv(self.reduce(x))) + self.shortcut(x))


def _stem(input_size: int, channels: int) -> list[nn.Module]:
    if input_size == 32:
        return [conv_norm(3, channels, 3, padding=1, eps=_EPS)]
    pool = nn.MaxPool2d(3, stride=2, padding=1)
    if input_size == 64:
        return [nn.Sequential(conv_norm(3, channels, 3, padding=1, eps=_EPS), pool)]
    return [nn.Sequential(conv_norm(3, channels, 7, 2, padding=3, eps=_EPS), pool)]


def resnet(counts: Sequence[int], input_size: int = 224, classes: int = 1000, width: float = 1.0) -> Chain:
    """A bottleneck ResNet with ``counts`` blocks at 64, 128, 256, ... middle channels, times ``width``.

    ``[B, 3, input_size, input_size]`` to logits ``[B, classes]`` in ``sum(counts) + 3`` blocks.
    Deviations for 32 and 64: the first convolution is 3x3 with stride 1 (7x7 with stride 2), and at 32 no
    pooling follows it. Raises ConfigError for another size.
    """
    channels = scaled(64, width)
    blocks = _stem(check_input_size(input_size), channels)
    for group, count in enumerate(counts):
        middle = scaled(64 * 2**group, width)
        for number in range(count):
            blocks.append(Bottleneck(channels, middle, stride=2 if group and not number else 1))
            channels = _EXPANSION * middle
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return initialise(Chain(*blocks, pool, nn.Linear(channels, classes)))


def resnet50(input_size: int = 224, classes: int = 1000, width: float = 1.0) -> Chain:
    """:func:`resnet` with counts 3, 4, 6, 3: 25,557,032 parameters at 1000 classes and 224."""
    return resnet((3, 4, 6, 3), input_size, classes, width)


def resnet101(input_size: int = 224, classes: int = 1000, width: float = 1.0) -> Chain:
    """:func:`resnet` with counts 3, 4, 23, 3: 44,549,160 parameters at 1000 classes and 224."""
    return resnet((3, 4, 23, 3), input_size, classes, width)
