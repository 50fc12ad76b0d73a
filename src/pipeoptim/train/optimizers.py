"""Optimizers by name: every class of ``torch.optim``, a few aliases, or ``module:Class``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from pipeoptim.config import Component
from pipeoptim.errors import ConfigError
from pipeoptim.train.names import unknown
from pipeoptim.train.targets import accepts, call, load

#: name -> class name in torch.optim and the options that make the name true.
ALIASES: dict[str, tuple[str, dict[str, Any]]] = {
    "momentum": ("SGD", {"momentum": 0.9}),
    "nesterov": ("SGD", {"momentum": 0.9, "nesterov": True}),
    "amsgrad": ("Adam", {"amsgrad": True}),
}

#: They need what a pipeline cannot give: a closure that evaluates the loss again, sparse gradients.
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
    classes = known()
    for impossible, reason in _IMPOSSIBLE.items():
        if name.lower() == impossible.lower():
            raise ConfigError(f"optimizer {name!r} cannot be used in a pipeline: it {reason}; use adamw or sgd")
    class_name, options = ALIASES.get(name.lower(), (name, {}))
    if class_name.lower() not in classes:
        raise unknown("optimizer", name, [*classes, *ALIASES], more=", or 'module:Class' for one of your own")
    return classes[class_name.lower()], options


def switch(component: Component, name: str) -> Component:
    """``component`` with another optimizer; options that the new class does not have are left out."""
    function, own = resolve(name)
    kept = {option: value for option, value in component.options.items() if accepts(function, option)}
    return Component(name, {**kept, **own})


class Factory(Protocol):
    """Makes the optimizer of stage ``k`` from its parameters."""

    def __call__(self, parameters: Iterable[Parameter], k: int = 0, /) -> Optimizer: ...


def factory(component: Component) -> Factory:
    """A function that makes the optimizer of one stage from its parameters. All options must be known to the class.

    An option ``{"by_stage": [...]}`` has a value for each stage.
    """
    function, own = resolve(component.target)

    def make(parameters: Iterable[Parameter], k: int = 0) -> Optimizer:
        options = {name: _of_stage(value, k) for name, value in {**own, **component.options}.items()}
        optimizer: Optimizer = call("optimizer", function, component.target, list(parameters), **options)
        return optimizer

    return make


def _of_stage(value: Any, k: int) -> Any:
    return value["by_stage"][k] if isinstance(value, dict) and "by_stage" in value else value
