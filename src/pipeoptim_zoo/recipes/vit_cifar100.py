"""A vision transformer on CIFAR-100: not in the paper; what image models look like today."""

from __future__ import annotations

from dataclasses import replace

from pipeoptim.config import Component, TrainConfig, recipe
from pipeoptim_zoo.recipes._paper import CIFAR100_IMAGES, VALIDATION_IMAGES
from pipeoptim_zoo.recipes._tiny import on_digits

BATCH = 128


@recipe
def vit_cifar100(tiny: bool = False) -> TrainConfig:
    """A vision transformer (12 layers, 5 million weights, 4 stages) on CIFAR-100 with AdamW.

    Source: Dosovitskiy et al. (ICLR 2021) for the model; patches of 4x4 pixels, 100 epochs, lr 1e-3 with 5 epochs of warm-up
    and weight decay 0.05 are ours.
    Tiny: 6 layers of width 64, patches of 8x8, lr 0.003.
    """
    epoch = CIFAR100_IMAGES // BATCH
    config = TrainConfig(
        recipe="vit_cifar100",
        model=Component(
            "pipeoptim_zoo.models.vit:vit",
            {"input_size": 32, "patch": 4, "width": 192, "layers": 12, "heads": 3, "classes": 100, "dropout": 0.1},
        ),
        data=Component("pipeoptim_zoo.data.cifar:cifar100", {"root": "data"}),
        optimizer=Component("adamw", {"lr": 1e-3, "weight_decay": 0.05}),
        lr_schedule=Component("cosine", {"warmup": 5 * epoch, "final": 0.01}),
        stages=4,
        microbatches=4,
        batch_size=BATCH,
        steps=0,
        epochs=100,
        eval_every=epoch,
        eval_batches=VALIDATION_IMAGES // BATCH,
        checkpoint_every=epoch,
    )
    if not tiny:
        return config
    config = on_digits(config, steps=400, lr=0.003, patch=8, width=64, layers=6, heads=4, dropout=0.0)
    return replace(config, lr_schedule=config.lr_schedule.with_options(warmup=25))
