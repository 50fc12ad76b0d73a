"""``--set model.source=folder``: options of a run's components, by the component's name and a path in its options."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pipeoptim.config import Component, TrainConfig
from pipeoptim.errors import ConfigError, did_you_mean
from pipeoptim.train.trust import COMPONENTS


def with_set(config: TrainConfig, settings: Sequence[str]) -> TrainConfig:
    """``config`` with options of its components replaced or added, in this order.

    Args:
        settings: ``part.option=value`` or, in a table, ``part.option.key=value``; the value is read as JSON where it is JSON, and else is
            a string.

    Raises:
        ConfigError: another form, or no such component.

    Example:
        >>> config = TrainConfig("mine", model=Component("m:f"), data=Component("d:f"), optimizer=Component("sgd"))
        >>> with_set(config, ["model.width=64", "data.path=texts", "model.lora.r=8"]).model.options
        {'width': 64, 'lora': {'r': 8}}
    """
    for text in settings:
        path, equals, value = text.partition("=")
        part, *keys = path.split(".")
        if not equals or not keys or not all(keys):
            raise ConfigError(f"--set {text!r} is not of the form part.option=value, such as data.text=book.txt")
        if part not in COMPONENTS:
            hint = did_you_mean(part, COMPONENTS)
            raise ConfigError(f"--set {text!r} begins with {part!r}{hint or ','} which must be one of {', '.join(COMPONENTS)}")
        component: Component = getattr(config, part)
        changed = replace(component, options=_put(component.options, keys, _value(value)))
        config = replace(config, **{part: changed})  # type: ignore[arg-type]
    return config


def _put(options: dict[str, Any], keys: Sequence[str], value: Any) -> dict[str, Any]:
    key, *inner = keys
    before = options.get(key)
    return {**options, key: _put(before if isinstance(before, dict) else {}, inner, value) if inner else value}


def _value(value: str) -> Any:
    try:
        return json.loads(value, parse_constant=str)  # NaN is no JSON, so it is a string
    except (ValueError, RecursionError):
        return value
