"""Turns settings into runs: which methods take part, with which optimizer, and why others do not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipeoptim.compare.settings import ComparisonSettings
from pipeoptim.config import Component, TrainConfig
from pipeoptim.errors import ConfigError
from pipeoptim.methods import Method, get_method
from pipeoptim.schedule import ORDERS
from pipeoptim.train.change_method import with_method
from pipeoptim.train.checks import check_method

#: Optimizers whose learning rates are on the same scale as NAdam's.
ADAMS = ("adam", "adamw", "nadam", "radam", "amsgrad")

#: For an optimizer that a method brings along, where the comparison's own says nothing about its scale.
OWN_LR = 0.001


@dataclass(frozen=True)
class PlannedRun:
    """One run of a comparison: its folder's name and its complete configuration."""

    name: str
    config: TrainConfig


@dataclass(frozen=True)
class ComparisonPlan:
    """All runs, seed by seed, so that an interrupted comparison has whole seeds; and the methods left out, with reasons."""

    runs: tuple[PlannedRun, ...]
    left_out: Mapping[str, str]


def plan_comparison(settings: ComparisonSettings) -> ComparisonPlan:
    """The runs that ``settings`` mean.

    Raises:
        ConfigError: a method is unknown, every one of them refuses the setting, or rates by the gap change none of them.
    """
    left_out = {}
    if settings.config.rate_by_gap and all(flushes(name) for name in settings.methods):
        raise ConfigError(
            f"rate_by_gap is {settings.config.rate_by_gap}, but no gradient is old in {', '.join(settings.methods)}; leave it out"
        )
    for name in settings.methods:
        config = under_method(settings, name)
        try:
            check_method(config)
        except ConfigError as error:
            left_out[name] = str(error)
    if len(left_out) == len(settings.methods):
        raise ConfigError(f"no method is left to compare: {next(iter(left_out.values()), 'name some with --methods')}")
    taking_part = [name for name in settings.methods if name not in left_out]
    return ComparisonPlan(tuple(planned(settings, name, seed) for seed in settings.seeds for name in taking_part), left_out)


def flushes(name: str) -> bool:
    """Whether a method empties the pipeline in every mini-batch, so that its version gaps are 0."""
    return ORDERS[get_method(name).order].flushes


def under_method(settings: ComparisonSettings, name: str) -> TrainConfig:
    """What all runs share, under one method. Rates by the gap would be refused where all gaps are 0: (1 + 0)^p divides by 1."""
    config = with_method(settings.config, name)
    return replace(config, rate_by_gap=0.0) if flushes(name) else config


def planned(settings: ComparisonSettings, name: str, seed: int) -> PlannedRun:
    """The run of the method called ``name`` (which may carry options) with ``seed``."""
    method, config = get_method(name), replace(under_method(settings, name), seed=seed)
    if method.optimizer is not None and not settings.same_optimizer:
        config = replace(config, optimizer=own_optimizer(method, settings))
    return PlannedRun(f"{_as_folder(name)}-seed{seed}", config)


def _as_folder(name: str) -> str:
    """``name`` without characters that a folder's name must not contain.

    >>> _as_folder("pipemare(anneal_updates=100)")
    'pipemare_anneal_updates_100'
    """
    return re.sub(r"[^\w.+-]+", "_", name).strip("_.")


def own_optimizer(method: Method, settings: ComparisonSettings) -> Component:
    """The optimizer that ``method`` brings along; an option that is not the same on every stage is given by stage."""
    own, base = method.optimizer, settings.config
    assert own is not None
    stages = [dict(own.options(k, base.stages)) for k in range(base.stages)]
    options: dict[str, Any] = {key: _one_or_all([stage[key] for stage in stages]) for key in stages[0]}
    return Component(own.name.lower(), {"lr": own_lr(settings), **options})


def own_lr(settings: ComparisonSettings) -> float:
    """Learning rate of an optimizer that a method brings along."""
    if settings.own_lr is not None:
        return settings.own_lr
    base = settings.config.optimizer
    lr = base.options.get("lr")
    return float(lr) if lr is not None and base.target.lower() in ADAMS else OWN_LR


def _one_or_all(values: list[Any]) -> Any:
    plain = [list(value) if isinstance(value, tuple) else value for value in values]
    return plain[0] if all(value == plain[0] for value in plain) else {"by_stage": plain}
