"""Another method for a configuration that was written for one: a recipe's prediction means nothing to methods that make none."""

from __future__ import annotations

from dataclasses import fields, replace

from pipeoptim.config import TrainConfig
from pipeoptim.options import PipelineOptions, about, settings_of


def with_method(config: TrainConfig, name: str) -> TrainConfig:
    """``config`` under the method called ``name`` (which may carry options), without settings that take no effect under it.

    Raises:
        ConfigError: the method is unknown.

    Example:
        >>> from pipeoptim.config import Component
        >>> parts = {name: Component("m:f") for name in ("model", "data", "optimizer")}
        >>> config = TrainConfig("mine", **parts, prediction="paper")
        >>> with_method(config, "spectrain").prediction, with_method(config, "gpipe").prediction
        ('paper', 'refined')
    """
    from pipeoptim.methods import get_method, refresh_every

    method, config = get_method(name), replace(config, method=name)
    # A method that predicts in a way of its own, or corrects steps, would refuse predictions from the mini-batch in progress.
    if not method.predicts_by_rule and refresh_every(config.prediction, None) is not None:
        config = replace(config, prediction=TrainConfig.prediction, refresh=TrainConfig.refresh)
    idle = {
        name: known.default
        for entry in fields(PipelineOptions)
        if (need := about(entry).needs) is not None and not need.met_by(method)
        for name, known in settings_of(entry).items()
    }
    return replace(config, **idle)
