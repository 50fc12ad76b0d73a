"""A recipe that takes seconds: images, BatchNorm and dropout."""

from __future__ import annotations

from dataclasses import replace

from pipeoptim.config import Component, TrainConfig, recipe


@recipe
def digits(tiny: bool = False) -> TrainConfig:
    """A small convolutional net (4 stages) learns scikit-learn's handwritten digits.

    Tiny: a quarter of the steps.
    """
    config = TrainConfig(
        recipe="digits",
        model=Component("pipeoptim_zoo.models.digits_cnn:digits_cnn", {"width": 16, "classes": 10}),
        data=Component("pipeoptim_zoo.data.digits:digits"),
        optimizer=Component("sgd", {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}),
        stages=4,
        batch_size=32,
        steps=400,
        eval_every=50,
        eval_batches=11,
        checkpoint_every=100,
    )
    return replace(config, steps=100, eval_every=25, checkpoint_every=0) if tiny else config
