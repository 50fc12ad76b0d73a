"""GoogLeNet on CIFAR-100: blocks of four branches."""

from __future__ import annotations

from pipeoptim.config import TrainConfig, recipe
from pipeoptim_zoo.recipes._paper import cifar100_adamw
from pipeoptim_zoo.recipes._tiny import on_digits


@recipe
def googlenet_cifar100(tiny: bool = False) -> TrainConfig:
    """GoogLeNet with BatchNorm (6 million weights, 4 stages) on CIFAR-100 with AdamW, as in the paper.

    Source and deviations: ``_paper``, ``_paper.cifar100_adamw``. Without auxiliary heads, as in the scripts. The net there
    begins with one 3x3 convolution to 192 channels (here three: 64, 64, 192), has two 3x3 convolutions in the third branch
    (here one) and no dropout (here 0.2).
    Tiny: a sixteenth of the width, dropout 0.1, lr 0.003.
    """
    config = cifar100_adamw("googlenet_cifar100", "pipeoptim_zoo.models.googlenet:googlenet", auxiliary=False)
    return on_digits(config, steps=200, batch_size=16, lr=0.003, width=0.0625, dropout=0.1) if tiny else config
