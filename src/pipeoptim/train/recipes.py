"""Finding recipes: by entry point, so that the library never imports a zoo, and a new recipe is one new file."""

from __future__ import annotations

import importlib
import pkgutil
from importlib.metadata import entry_points
from types import ModuleType

from pipeoptim.config import Recipe, TrainConfig
from pipeoptim.errors import ConfigError
from pipeoptim.train.names import unknown
from pipeoptim.train.targets import load

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


def get_recipe(name: str) -> TrainConfig:
    """The configuration of recipe ``name``, or of ``"module:function"`` for one that is not registered.

    Raises:
        ConfigError: unknown; the message lists the known ones.
    """
    if ":" in name:
        config = load("recipe", name)()
    else:
        known = recipes()
        if name not in known:
            raise unknown("recipe", name, known, more=", or 'module:function' for a recipe of your own")
        config = known[name]()
    if not isinstance(config, TrainConfig):
        raise ConfigError(f"recipe {name!r} returned a {type(config).__name__}, must return a pipeoptim.config.TrainConfig")
    return config
