"""ResNet-101 on Tiny-ImageNet: the paper's deepest image model."""

from __future__ import annotations

from pipeoptim.config import TrainConfig, recipe
from pipeoptim_zoo.recipes._paper import tiny_imagenet_sgd
from pipeoptim_zoo.recipes._tiny import on_digits


@recipe
def resnet101_tinyimagenet(tiny: bool = False) -> TrainConfig:
    """ResNet-101 (43 million weights, 4 stages) on Tiny-ImageNet with SGD and momentum, as in the paper.

    Source and deviations: ``_paper``, ``_paper.tiny_imagenet_sgd``. At 64x64 the first convolution is 3x3 with stride 1.
    Tiny: all 101 layers, an eighth of the width.
    """
    config = tiny_imagenet_sgd("resnet101_tinyimagenet", "pipeoptim_zoo.models.resnet:resnet101", 64)
    return on_digits(config, steps=200, batch_size=16, width=0.125) if tiny else config
