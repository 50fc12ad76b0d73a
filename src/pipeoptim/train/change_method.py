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
    from pipeoptim.methods import get_method

    method, config = get_method(name), replace(config, method=name)
    idle = {
        name: known.default
        for entry in fields(PipelineOptions)
        if (need := about(entry).needs) is not None and not need.met_by(method)
        for name, known in settings_of(entry).items()
    }
    return replace(config, **idle)
