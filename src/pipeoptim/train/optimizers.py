"""Optimizers by name: every class of ``torch.optim``, a few aliases, or ``module:Class``; the same on every stage or not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from pipeoptim.config import Component
from pipeoptim.errors import ConfigError, unknown_name
from pipeoptim.rules import KINDS, muon_adamw
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
    if name.lower() == "muon_adamw":
        return muon_adamw, {}
    classes = known()
    for impossible, reason in _IMPOSSIBLE.items():
        if name.lower() == impossible.lower():
            raise ConfigError(f"optimizer {name!r} cannot be used in a pipeline: it {reason}; use adamw or sgd")
    class_name, options = ALIASES.get(name.lower(), (name, {}))
    if class_name.lower() not in classes:
        raise unknown_name(
            "optimizer", name, [*classes, *ALIASES, "muon_adamw"], more=", or 'module:Class' for one of your own"
        )
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


class Factory(Protocol):
    """Makes the optimizer of stage ``k`` from its parameters."""

    def __call__(self, parameters: Iterable[Parameter], k: int = 0, /) -> Optimizer: ...


def factory(component: Component, stages: int | None = None) -> Factory:
    """A function that makes the optimizer of one stage from its parameters. All options must be known to the class.

    An option ``{"by_stage": [...]}`` has a value for each stage. With one class per stage each gets the options that it has. The
    option ``groups`` cuts the parameters into groups with options of their own, see :func:`grouped`.

    Raises:
        ConfigError: not one name, and not one per stage either; or an option that none of the classes has.
    """
    each = resolve_each(component.target)
    if len(each) > 1 and stages is not None and len(each) != stages:
        raise ConfigError(f"optimizer {component.target!r} names {len(each)} for {stages} stages; name one, or one per stage")
    shared = {name: value for name, value in component.options.items() if name != "groups"}
    if len(each) > 1:
        for name in shared:
            if not any(accepts(function, name) for _, function, _ in each):
                raise ConfigError(f"option {name!r} belongs to none of the optimizers {component.target}; leave it out")

    def make(parameters: Iterable[Parameter], k: int = 0) -> Optimizer:
        target, function, own = each[k] if len(each) > 1 else each[0]
        options = {name: _of_stage(value, k) for name, value in {**own, **shared}.items()}
        if len(each) > 1:
            options = {name: value for name, value in options.items() if accepts(function, name)}
        chosen = grouped(list(parameters), component.options.get("groups", ()))
        optimizer: Optimizer = call("optimizer", function, target, chosen, **options)
        return optimizer

    return make


def grouped(parameters: list[Parameter], groups: Any) -> list[Parameter] | list[dict[str, Any]]:
    """Parameter groups, for instance to predict matrices otherwise than the rest.

    Args:
        groups: each a dictionary of options of ``torch.optim``, with ``prediction`` among them if wished, and perhaps ``ndim``: then
            the group takes only parameters with so many dimensions. A parameter goes to the first group that takes it, or to a
            last one without options of its own.

    Raises:
        ConfigError: a group is no dictionary, or names an unknown kind of prediction.

    >>> w, b = Parameter(torch.ones(2, 2)), Parameter(torch.ones(2))
    >>> found = grouped([w, b], [{"ndim": 2, "prediction": "displacement"}, {"lr": 0.1}])
    >>> [(len(g["params"]), g.get("prediction"), g.get("lr")) for g in found]
    [(1, 'displacement', None), (1, None, 0.1)]
    """
    if not groups:
        return parameters
    made: list[dict[str, Any]] = []
    left = parameters
    for group in [*groups, {}]:
        if not isinstance(group, dict):
            raise ConfigError(f'a parameter group is {group!r}, must be like {{"ndim": 2, "prediction": "displacement"}}')
        if group.get("prediction", "none") not in KINDS:
            raise unknown_name("prediction of a parameter group", str(group["prediction"]), KINDS)
        options = {name: value for name, value in group.items() if name != "ndim"}
        taken = [p for p in left if "ndim" not in group or p.ndim == group["ndim"]]
        left = [p for p in left if "ndim" in group and p.ndim != group["ndim"]]
        if taken:
            made.append({"params": taken, **options})
    return made


def read_group(text: str) -> dict[str, Any]:
    """A parameter group from the command line.

    >>> read_group("ndim=2,prediction=displacement,lr=0.01")
    {'ndim': 2, 'prediction': 'displacement', 'lr': 0.01}

    Raises:
        ConfigError: not of the form ``name=value,name=value``.
    """
    group: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not (name.strip() and equals and value.strip()):
            raise ConfigError(f"group is {text!r}, must be like ndim=2,prediction=displacement,lr=0.01")
        try:
            group[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            group[name.strip()] = value.strip()
    return group


def _of_stage(value: Any, k: int) -> Any:
    return value["by_stage"][k] if isinstance(value, dict) and "by_stage" in value else value
