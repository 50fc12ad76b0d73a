"""AlexNet on Tiny-ImageNet: the paper's plain net without normalisation, where asynchronous training is hardest."""

from __future__ import annotations

from pipeoptim.config import TrainConfig, recipe
from pipeoptim_zoo.recipes._paper import tiny_imagenet_sgd
from pipeoptim_zoo.recipes._tiny import on_digits


@recipe
def alexnet_tinyimagenet(tiny: bool = False) -> TrainConfig:
    """AlexNet (30 million weights, 4 stages) on Tiny-ImageNet with SGD and momentum, as in the paper.

    Source and deviations: ``_paper``, ``_paper.tiny_imagenet_sgd``. At 64x64 the classifier sees 3x3 positions, not 6x6.
    Tiny: an eighth of the width, dropout 0.1, lr 0.003. At 0.01 this narrow net learns synchronously, but stalls or diverges
    with every asynchronous method tried (three seeds of pipeoptim, pipeoptim_stash, pipedream and naive).
    """
    config = tiny_imagenet_sgd("alexnet_tinyimagenet", "pipeoptim_zoo.models.alexnet:alexnet", 128)
    return on_digits(config, steps=400, lr=0.003, width=0.125, dropout=0.1) if tiny else config
