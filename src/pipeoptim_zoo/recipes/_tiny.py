"""The tiny form of a recipe: the same method, optimizer and schedule on a narrow model and data that every machine has.

It shows that a setting works, in a minute on two cores. It says nothing about the accuracy of the setting itself.
"""

from __future__ import annotations

from dataclasses import replace

from pipeoptim.config import Component, TrainConfig

VALIDATIONS = 5  # in a run


def on_digits(config: TrainConfig, steps: int, batch_size: int = 32, lr: float | None = None, **model: object) -> TrainConfig:
    """scikit-learn's digits as images of 3x32x32; ``model`` replaces options of the model, ``width`` above all."""
    data = Component("pipeoptim_zoo.data.digits:digits", {"input_size": 32, "channels": 3})
    return _shortened(config, data, {"input_size": 32, "classes": 10, **model}, steps, batch_size, lr)


def on_packages(config: TrainConfig, steps: int, batch_size: int = 32, lr: float | None = None, **model: object) -> TrainConfig:
    """Which of ten packages of Python's standard library a snippet of 64 characters is from."""
    data = Component("pipeoptim_zoo.data.stdlib_packages:packages", {"context": 64})
    return _shortened(config, data, {"vocab_size": 99, "classes": 10, **model}, steps, batch_size, lr)


def on_unicode_names(
    config: TrainConfig, steps: int, batch_size: int = 32, lr: float | None = None, **model: object
) -> TrainConfig:
    """From what Unicode says of a character (at most 24 letters) to the character's name, letter by letter."""
    data = Component("pipeoptim_zoo.data.unicode_names:unicode_names")
    return _shortened(config, data, {"vocab_size": 63, "source_length": 24, **model}, steps, batch_size, lr)


def _shortened(
    config: TrainConfig, data: Component, model: dict[str, object], steps: int, batch_size: int, lr: float | None
) -> TrainConfig:
    return replace(
        config,
        data=data,
        model=config.model.with_options(**model),
        optimizer=config.optimizer if lr is None else config.optimizer.with_options(lr=lr),
        batch_size=batch_size,
        steps=steps,
        epochs=0,
        eval_every=steps // VALIDATIONS,
        eval_batches=352 // batch_size,
        checkpoint_every=0,
    )
