"""Parameter groups of a run's optimizers: read from the command line, checked, and filled with parameters."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

from pipeoptim.errors import ConfigError, unknown_name
from pipeoptim.rules import KINDS
from pipeoptim.train.targets import accepts, call


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
        if name.strip() in group:
            raise ConfigError(f"group is {text!r}, which names {name.strip()} twice; give it once")
        group[name.strip()] = _value(value.strip())
    return group


def _value(text: str) -> Any:
    """A JSON value, a number as Python writes it (1e-3, nan), or a word."""
    for read in (json.loads, float):
        with suppress(ValueError):
            return read(text)
    return text


def check_group(group: Any, each: Sequence[tuple[str, Callable[..., Optimizer], dict[str, Any]]]) -> None:
    """Check that the optimizers (name, class, options) have every option of a parameter group and accept its value.

    torch itself validates only the options of the whole optimizer: in a group it accepts any value and ignores unknown names.

    Raises:
        ConfigError: they do not.
    """
    if not isinstance(group, dict):
        raise ConfigError(f'a parameter group is {group!r}, must be like {{"ndim": 2, "prediction": "displacement"}}')
    kind, ndim = group.get("prediction", "none"), group.get("ndim", 0)
    if kind not in KINDS:
        raise unknown_name("prediction of a parameter group", str(kind), KINDS)
    if isinstance(ndim, bool) or not isinstance(ndim, int) or ndim < 0:
        raise ConfigError(f"ndim of a parameter group is {ndim!r}, must be a number of dimensions, for example 2 for matrices")
    if not isinstance(group.get("layer", ""), str):
        raise ConfigError(
            f"layer of a parameter group is {group['layer']!r}, must be a class of modules, for example Embedding"
        )
    if "lr" in group:
        check_rate("lr of a parameter group", group["lr"])
    options = {name: value for name, value in group.items() if name not in ("prediction", *_SELECTORS)}
    for name in options:
        if name == "params" or not any(accepts(function, name) for _, function, _ in each):
            targets = ",".join(target for target, _, _ in each)
            raise ConfigError(
                f"option {name!r} of a parameter group is none of optimizer {targets}; leave it out, or correct its name"
            )
    for target, function, own in each:  # a trial: the class checks the options that it is made with
        tried = {name: value for name, value in options.items() if accepts(function, name)}
        call("a parameter group of optimizer", function, target, [Parameter(torch.zeros(2, 2))], **{**own, **tried})


LARGEST_FLOAT32 = 3.4028234663852886e38


def check_rate(name: str, value: Any) -> None:
    """Check that a learning rate is a finite number above 0.

    Raises:
        ConfigError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ConfigError(f"{name} is {value!r}, must be a finite number above 0, for example 0.001")
    if value > LARGEST_FLOAT32:
        raise ConfigError(f"{name} is {value!r}, more than float32 holds, must be a number such as 0.001")


_SELECTORS = ("ndim", "layer")
"""Entries of a group that say which parameters it takes."""


def split_parameters(stage: nn.Module | Iterable[Parameter], groups: Any) -> list[Parameter] | list[dict[str, Any]]:
    """The parameters of ``stage`` in groups, for instance to predict matrices in another way than the rest.

    Args:
        stage: a module, or parameters, of which no layer is known.
        groups: each a dictionary of options of ``torch.optim``, optionally with ``prediction``, and with what restricts the group:
            ``ndim``, to parameters with that many dimensions, and ``layer``, to those of modules of that class. A parameter goes to the
            first group that takes it, or to a last one without options of its own.

    >>> w, b = Parameter(torch.ones(2, 2)), Parameter(torch.ones(2))
    >>> found = split_parameters([w, b], [{"ndim": 2, "prediction": "displacement"}, {"lr": 0.1}])
    >>> [(len(g["params"]), g.get("prediction"), g.get("lr")) for g in found]
    [(1, 'displacement', None), (1, None, 0.1)]
    >>> model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2))
    >>> [len(g["params"]) for g in split_parameters(model, [{"layer": "Embedding", "lr": 0.1}])]
    [1, 2]
    """
    if not groups:
        return _parameters([stage])
    taken = _taken([stage], groups)
    return [
        {"params": own, **{name: value for name, value in group.items() if name not in _SELECTORS}}
        for group, own in zip([*groups, {}], taken, strict=True)
        if own
    ]


def check_all_used(stages: Sequence[nn.Module], groups: Sequence[dict[str, Any]]) -> None:
    """Check that every group takes some of the parameters of a model.

    Raises:
        ConfigError: one takes none, so that its options would be ignored.
    """
    for group, own in zip(groups, _taken(stages, groups), strict=False):
        if not own:
            raise ConfigError(
                f"the parameter group {group} takes no weights: the model has none of that kind, or groups before it take "
                "them; leave it out, or name it earlier"
            )


def _taken(stages: Sequence[nn.Module | Iterable[Parameter]], groups: Sequence[dict[str, Any]]) -> list[list[Parameter]]:
    """The parameters of each group, then those that no group takes."""
    layers = _layers([stage for stage in stages if isinstance(stage, nn.Module)])
    found: list[list[Parameter]] = [[] for _ in range(len(groups) + 1)]
    for p in _parameters(stages):
        numbers = (n for n, group in enumerate(groups) if _takes(group, p, layers))
        found[next(numbers, len(groups))].append(p)
    return found


def _takes(group: Mapping[str, Any], p: Parameter, layers: Mapping[Parameter, set[str]]) -> bool:
    return group.get("ndim", p.ndim) == p.ndim and ("layer" not in group or group["layer"] in layers.get(p, ()))


def _layers(stages: Sequence[nn.Module]) -> dict[Parameter, set[str]]:
    """Parameter -> classes of the modules that hold it themselves; several where it is shared."""
    found: dict[Parameter, set[str]] = {}
    for module in (inner for stage in stages for inner in stage.modules()):
        for p in module.parameters(recurse=False):
            found.setdefault(p, set()).add(type(module).__name__)
    return found


def _parameters(stages: Sequence[nn.Module | Iterable[Parameter]]) -> list[Parameter]:
    """Those that are trained: of frozen ones there would be a copy with every prediction."""
    every = (p for stage in stages for p in (stage.parameters() if isinstance(stage, nn.Module) else stage))
    return [p for p in every if p.requires_grad]
