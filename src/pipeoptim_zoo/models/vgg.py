"""VGG-16 (configuration D): Simonyan and Zisserman, "Very Deep Convolutional Networks" (ICLR 2015)."""

from __future__ import annotations

from torch import nn

from pipeoptim_zoo.models.chain import Chain
from pipeoptim_zoo.models.image import check_input_size, initialise, scaled

__all__ = ["vgg16"]

_GROUPS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels, convolutions before the pooling


def vgg16(
    input_size: int = 224,
    classes: int = 1000,
    width: float = 1.0,
    dropout: float = 0.5,
    batch_norm: bool = False,
    hidden: int = 4096,
) -> Chain:
    """Sixteen weight layers in seventeen blocks, ``[B, 3, input_size, input_size]`` to ``[B, classes]``.

    138,357,544 parameters at 224 with 1000 classes (138,365,992 with ``batch_norm``, which is not in the
    paper).
    Deviation for 32 and 64: the classifier sees the 1x1 or 2x2 positions that are left (7x7 in the published
    net). ``hidden=0`` leaves out its two hidden layers (and dropout), as most nets for CIFAR do: fifteen blocks.
    Raises ConfigError for another size.
    """
    side = check_input_size(input_size) // 32 if input_size < 224 else 7
    blocks: list[nn.Module] = []
    channels = 3
    for base, count in _GROUPS:
        for number in range(count):
            outputs = scaled(base, width)
            layers: list[nn.Module] = [nn.Conv2d(channels, outputs, 3, padding=1)]
            layers += [nn.BatchNorm2d(outputs)] if batch_norm else []
            layers += [nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if number == count - 1 else []
            blocks.append(nn.Sequential(*layers))
            channels = outputs
    blocks.append(nn.Sequential(nn.AdaptiveAvgPool2d(side), nn.Flatten()))
    features = channels * side * side
    if hidden:
        outputs = scaled(hidden, width)
        for inputs in (features, outputs):
            blocks.append(nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(dropout)))
        features = outputs
    return initialise(Chain(*blocks, nn.Linear(features, classes)))
