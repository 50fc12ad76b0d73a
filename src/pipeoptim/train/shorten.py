"""Fits a learning-rate schedule to a run that is shorter than its recipe: the warm-up must not outlast the run."""

from __future__ import annotations

from dataclasses import replace

from pipeoptim.config import TrainConfig

#: The largest part of a run that may be warm-up before it is shortened.
PART = 4


def shortened(config: TrainConfig) -> TrainConfig:
    """``config`` with a warm-up of at most a quarter of the steps.

    Example:
        >>> from pipeoptim.config import Component
        >>> parts = {name: Component("m:f") for name in ("model", "data", "optimizer")}
        >>> config = TrainConfig("mine", **parts, lr_schedule=Component("cosine", {"warmup": 50}), steps=100)
        >>> shortened(config).lr_schedule.options
        {'warmup': 25}
    """
    warmup = config.lr_schedule.options.get("warmup")
    if not isinstance(warmup, int) or warmup * PART <= config.steps:
        return config
    return replace(config, lr_schedule=config.lr_schedule.with_options(warmup=max(0, config.steps // PART)))


def warmup_note(config: TrainConfig) -> str:
    """A note on what :func:`shortened` changes; empty where it changes nothing."""
    was, now = (c.lr_schedule.options.get("warmup") for c in (config, shortened(config)))
    return (
        "" if was == now else f"warm-up: {now} updates, a quarter of the {config.steps} steps, in place of the recipe's {was}"
    )
