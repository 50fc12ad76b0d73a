"""VGG-16 on CIFAR-100: a straight line of convolutions."""

from __future__ import annotations

from pipeoptim.config import TrainConfig, recipe
from pipeoptim_zoo.recipes._paper import cifar100_adamw
from pipeoptim_zoo.recipes._tiny import on_digits


@recipe
def vgg16_cifar100(tiny: bool = False) -> TrainConfig:
    """VGG-16 with BatchNorm (15 million weights, 4 stages) on CIFAR-100 with AdamW, as in the paper.

    Source and deviations: ``_paper``, ``_paper.cifar100_adamw``. As in the scripts, one linear layer follows the convolutions,
    without hidden layers and dropout (14,774,436 weights).
    Tiny: an eighth of the width.
    """
    config = cifar100_adamw("vgg16_cifar100", "pipeoptim_zoo.models.vgg:vgg16", batch_norm=True, hidden=0)
    return on_digits(config, steps=300, width=0.125) if tiny else config
