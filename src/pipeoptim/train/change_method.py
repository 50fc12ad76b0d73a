"""Another method for a configuration that was written for one: a recipe's prediction means nothing to methods that make none."""

from __future__ import annotations

from dataclasses import replace

from pipeoptim.config import TrainConfig


def with_method(config: TrainConfig, name: str) -> TrainConfig:
    """``config`` under the method called ``name`` (which may carry options), without settings of predictions that it does not make.

    Raises:
        ConfigError: the method is unknown.

    Example:
        >>> from pipeoptim.config import Component
        >>> parts = {name: Component("m:f") for name in ("model", "data", "optimizer")}
        >>> config = TrainConfig("mine", **parts, prediction="paper")
        >>> with_method(config, "spectrain").prediction, with_method(config, "gpipe").prediction
        ('paper', 'refined')
    """
    from pipeoptim.methods import get_method

    method, config = get_method(name), replace(config, method=name)
    if not method.predicts:
        config = replace(config, prediction=TrainConfig.prediction)
    if not method.forward.predicts:
        config = replace(config, monitor_every=0)
    return config
