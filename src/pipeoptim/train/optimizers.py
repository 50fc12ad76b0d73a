"""Optimizers by name: every class of ``torch.optim``, a few aliases, or ``module:Class``; the same on every stage or not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

from pipeoptim.config import Component
from pipeoptim.errors import ConfigError, counted, unknown_name
from pipeoptim.optim import RotatedAdam
from pipeoptim.rules import muon_adamw
from pipeoptim.train.parameter_groups import check_group, split_parameters
from pipeoptim.train.targets import accepts, call, load

#: name -> class name in torch.optim, and the options that the name implies.
ALIASES: dict[str, tuple[str, dict[str, Any]]] = {
    "momentum": ("SGD", {"momentum": 0.9}),
    "nesterov": ("SGD", {"momentum": 0.9, "nesterov": True}),
    "amsgrad": ("Adam", {"amsgrad": True}),
}

#: name -> optimizers of this library.
OWN: dict[str, Callable[..., Optimizer]] = {"muon_adamw": muon_adamw, "rotated_adam": RotatedAdam}

#: They need what a pipeline cannot provide: a closure that evaluates the loss again, or sparse gradients.
_IMPOSSIBLE = {"LBFGS": "calls the loss several times per update", "SparseAdam": "needs sparse gradients"}


def known() -> dict[str, type[Optimizer]]:
    """Lower-case name -> class, for every optimizer of the installed torch that a pipeline can use."""
    classes = {name: value for name, value in vars(torch.optim).items() if isinstance(value, type)}
    return {
        name.lower(): value
        for name, value in classes.items()
        if issubclass(value, Optimizer) and value is not Optimizer and name not in _IMPOSSIBLE
    }


def resolve(name: str) -> tuple[Callable[..., Optimizer], dict[str, Any]]:
    """The class that ``name`` means (case does not matter) and the options that belong to the name.

    Raises:
        ConfigError: unknown; the message lists the known ones.
    """
    if ":" in name:
        return load("optimizer", name), {}
    if name.lower() in OWN:
        return OWN[name.lower()], {}
    classes = known()
    for impossible, reason in _IMPOSSIBLE.items():
        if name.lower() == impossible.lower():
            raise ConfigError(f"optimizer {name!r} cannot be used in a pipeline: it {reason}; use adamw or sgd")
    class_name, options = ALIASES.get(name.lower(), (name, {}))
    if class_name.lower() not in classes:
        raise unknown_name("optimizer", name, [*classes, *ALIASES, *OWN], more=", or 'module:Class' for one of your own")
    return classes[class_name.lower()], options


def resolve_each(target: str) -> list[tuple[str, Callable[..., Optimizer], dict[str, Any]]]:
    """Name, class and own options of each stage's optimizer; a single one where all stages have the same.

    ``"sgd,adamw,adamw,muon_adamw"`` names one per stage.
    """
    return [(name, *resolve(name)) for name in (part.strip() for part in target.split(","))]


def switch(component: Component, name: str) -> Component:
    """``component`` with another optimizer; options that the new class does not have are left out."""
    each = resolve_each(name)
    own = each[0][2] if len(each) == 1 else {}
    kept = {
        option: value
        for option, value in component.options.items()
        if option == "groups" or any(accepts(function, option) for _, function, _ in each)
    }
    return Component(name, {**kept, **own})


def kept_note(before: Component, after: Component) -> str:
    """A note on the options that :func:`switch` keeps, besides the learning rate; empty where it keeps none.

    >>> kept_note(Component("adamw", {"lr": 0.1, "weight_decay": 0.01}), Component("adam", {"lr": 0.2, "weight_decay": 0.01}))
    "optimizer adam: weight_decay 0.01, as the recipe's adamw"
    """
    kept = [
        f"{name} {value}"
        for name, value in after.options.items()
        if name not in ("lr", "groups") and before.options.get(name) == value
    ]
    return f"optimizer {after.target}: {', '.join(kept)}, as the recipe's {before.target}" if kept else ""


class Factory(Protocol):
    """Makes the optimizer of stage ``k`` from its module or its parameters; only a module can tell their layers."""

    def __call__(self, stage: nn.Module | Iterable[Parameter], k: int = 0, /) -> Optimizer: ...


def factory(component: Component, stages: int | None = None) -> Factory:
    """A function that makes the optimizer of one stage from its parameters. All options must be known to the class.

    An option ``{"by_stage": [...]}`` has a value for each stage. With one class per stage each gets the options that it has. The
    option ``groups`` cuts the parameters into groups with options of their own, see :mod:`.parameter_groups`.

    Raises:
        ConfigError: not one name, and not one per stage either; or an option that none of the classes has.
    """
    each = resolve_each(component.target)
    if len(each) > 1 and stages is not None and len(each) != stages:
        raise ConfigError(
            f"optimizer {component.target!r} names {len(each)} for {counted(stages, 'stage')}; name one, or one per stage"
        )
    shared = {name: value for name, value in component.options.items() if name != "groups"}
    if len(each) > 1:
        for name in shared:
            if not any(accepts(function, name) for _, function, _ in each):
                raise ConfigError(f"option {name!r} belongs to none of the optimizers {component.target}; leave it out")
    groups = component.options.get("groups", ())

    def options_of(k: int) -> tuple[str, Callable[..., Optimizer], dict[str, Any]]:
        target, function, own = each[k] if len(each) > 1 else each[0]
        options = {name: _of_stage(value, k) for name, value in {**own, **shared}.items()}
        if len(each) > 1:
            options = {name: value for name, value in options.items() if accepts(function, name)}
        return target, function, options

    def make(stage: nn.Module | Iterable[Parameter], k: int = 0) -> Optimizer:
        target, function, options = options_of(k)
        optimizer: Optimizer = call("optimizer", function, target, split_parameters(stage, groups), **options)
        return optimizer

    for group in groups:
        check_group(group, [options_of(k) for k in range(len(each))])
    return make


def _of_stage(value: Any, k: int) -> Any:
    return value["by_stage"][k] if isinstance(value, dict) and "by_stage" in value else value
