"""Inception-V3 on Tiny-ImageNet: blocks of many branches."""

from __future__ import annotations

from pipeoptim.config import TrainConfig, recipe
from pipeoptim_zoo.recipes._paper import tiny_imagenet_sgd
from pipeoptim_zoo.recipes._tiny import on_digits


@recipe
def inception_v3_tinyimagenet(tiny: bool = False) -> TrainConfig:
    """Inception-V3 (22 million weights, 4 stages) on Tiny-ImageNet with SGD and momentum, as in the paper.

    Source and deviations: ``_paper``, ``_paper.tiny_imagenet_sgd``. At 64x64 the stem has one stride and no pooling. Without
    the auxiliary head, as in the scripts.
    Tiny: a sixteenth of the width, dropout 0.1, lr 0.03.
    """
    model = "pipeoptim_zoo.models.inception_v3:inception_v3"
    config = tiny_imagenet_sgd("inception_v3_tinyimagenet", model, 64, auxiliary=False)
    return on_digits(config, steps=160, batch_size=16, lr=0.03, width=0.0625, dropout=0.1) if tiny else config
