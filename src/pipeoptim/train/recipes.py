"""Finds recipes by entry point, so that the library never imports a zoo and a new recipe is one new file."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeoptim.config import Component, Recipe, TrainConfig
from pipeoptim.errors import ConfigError, unknown_name
from pipeoptim.train.targets import accepts, load

GROUP = "pipeoptim.recipes"


def recipes() -> dict[str, Recipe]:
    """name -> recipe, of every module of every package in the entry-point group ``pipeoptim.recipes``.

    Raises:
        ConfigError: two recipes have the same name.
    """
    found: dict[str, Recipe] = {}
    for package in dict.fromkeys(point.value for point in entry_points(group=GROUP)):
        for module in _modules(package):
            for name, function in vars(module).items():
                if not getattr(function, "__pipeoptim_recipe__", False):
                    continue
                if found.setdefault(name, function) is not function:
                    raise ConfigError(f"two recipes are called {name!r} (second one in {module.__name__}); rename one")
    return found


def _modules(package: str) -> list[ModuleType]:
    root = importlib.import_module(package)
    names = sorted(info.name for info in pkgutil.iter_modules(getattr(root, "__path__", [])))
    return [root, *(importlib.import_module(f"{package}.{name}") for name in names)]


def get_recipe(name: str, tiny: bool = False) -> TrainConfig:
    """The configuration of recipe ``name``: what ``pipeoptim train --recipe NAME [--tiny]`` starts from, and any other command
    that takes these two options.

    Args:
        name: of a registered recipe, where ``-`` and ``_`` are the same, or ``"module:function"`` or ``"file.py:function"`` of another one.
        tiny: its tiny form: a narrow model of the same kind on data that need no download, with the recipe's method, optimizer
            and schedule; about a minute on two cores at most. Its name, ``config.recipe``, ends in ``-tiny``.

    Returns:
        A complete configuration; ``dataclasses.replace`` changes it. Its ``steps`` may be 0: then ``epochs`` say how long to
        train, and the steps are counted when the run has read its data. ``replace(config, steps=100)`` overrules that.

    Raises:
        ConfigError: unknown (the message lists the known ones), or without a tiny form.

    Example:
        >>> get_recipe("vgg16-cifar100").data.target, get_recipe("vgg16-cifar100", tiny=True).data.target
        ('pipeoptim_zoo.data.cifar:cifar100', 'pipeoptim_zoo.data.digits:digits')
    """
    function = _find(name)
    if tiny and not accepts(function, "tiny"):
        raise ConfigError(f"recipe {name!r} has no tiny form; leave --tiny out, or give it an argument tiny: bool = False")
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise ConfigError(f"recipe {name!r} needs arguments ({error}); give all of them default values") from error
    config = function(tiny=True) if tiny else function()
    if not isinstance(config, TrainConfig):
        raise ConfigError(f"recipe {name!r} returned a {type(config).__name__}, must return a pipeoptim.config.TrainConfig")
    return replace(config, recipe=f"{config.recipe}-tiny") if tiny else config


def chosen_config(recipe: str | None, tiny: bool, model: str | None, data: str | None, default: str) -> TrainConfig:
    """What a command starts from: a recipe, or ``model`` and ``data`` of the user's own.

    Args:
        recipe: its name; ``default`` where neither it nor both of the others are given.
        model, data: targets that take the place of the recipe's. Both without a recipe are a run of their own, with AdamW at 0.001.

    Raises:
        ConfigError: as :func:`get_recipe`; or the tiny form of no recipe.

    Example:
        >>> chosen_config(None, False, "mine:net", "mine.py:task", "chars").recipe
        'mine'
    """
    parts: dict[str, Any] = {
        what: Component(target) for what, target in (("model", model), ("data", data)) if target is not None
    }
    if recipe is not None or len(parts) < 2:
        return replace(get_recipe(default if recipe is None else recipe, tiny), **parts)
    if tiny:
        raise ConfigError("--tiny belongs to a recipe, and --model and --data are of your own; leave it out")
    name = Path(str(model).rpartition(":")[0]).stem or "own"
    return TrainConfig(name, optimizer=Component("adamw", {"lr": 1e-3}), **parts)


def full_name(name: str, tiny: bool) -> str:
    """What a run of recipe ``name`` is called: as the function, with ``-tiny`` behind it for the tiny form.

    >>> full_name("vgg16-cifar100", tiny=True)
    'vgg16_cifar100-tiny'
    """
    return (name if ":" in name else name.replace("-", "_")) + ("-tiny" if tiny else "")


def _find(name: str) -> Recipe:
    if ":" in name:
        return load("recipe", name)
    known = recipes()
    key = full_name(name, tiny=False)
    if key not in known:
        raise unknown_name("recipe", name, known, more=", or 'module:function' or 'file.py:function' for a recipe of your own")
    return known[key]
