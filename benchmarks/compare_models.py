"""The two settings of ``compare_all.py``: the embedded recipes, in a size of which hundreds of runs fit into an hour or two."""

from __future__ import annotations

from dataclasses import replace

from pipeoptim.config import TrainConfig
from pipeoptim_zoo.recipes import chars as chars_recipe
from pipeoptim_zoo.recipes import digits as digits_recipe


def digits() -> TrainConfig:
    """Handwritten digits, the recipe as it is: a convolutional net with BatchNorm and dropout, 9 passes over the data."""
    return replace(digits_recipe.digits(), eval_every=40)


def chars() -> TrainConfig:
    """The source of Python's standard library, character by character: the recipe's tiny GPT (width 64, context 32), with six
    layers instead of four, so that it can be cut into eight stages, and half of its steps.
    """
    config = chars_recipe.chars(tiny=True)
    return replace(config, model=config.model.with_options(layers=6), steps=150, eval_every=25)
