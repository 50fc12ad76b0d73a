"""Discovers methods: every module of ``methods/catalog`` defines one as ``METHOD``, so a new method is one new file.

``VARIANTS`` in the same module are further forms of it, named ``method+option``; ``FACTORY`` is a function that makes the method
with the user's options.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from types import MappingProxyType

from pipeoptim.errors import ConfigError
from pipeoptim.methods import catalog
from pipeoptim.methods.method import Method

_methods: dict[str, Method] = {}

METHODS: Mapping[str, Method] = MappingProxyType(_methods)
"""name -> method, in alphabetical order of their modules."""

_factories: dict[str, Callable[..., Method]] = {}

FACTORIES: Mapping[str, Callable[..., Method]] = MappingProxyType(_factories)
"""name -> function that makes the method with other options."""

_explanations: dict[str, str] = {}

EXPLANATIONS: Mapping[str, str] = MappingProxyType(_explanations)
"""name -> docstring of the module that defines the method: what it does, with its formula."""


def register_method(method: Method) -> Method:
    """Make ``method`` known by its name.

    Raises:
        ConfigError: no method, or its name is taken by a different one.
    """
    if not isinstance(method, Method):
        raise ConfigError(f"register_method() was given {method!r}, must be given a pipeoptim.Method")
    if _methods.get(method.name, method) != method:
        raise ConfigError(f"a method named {method.name!r} exists already; choose another name")
    _methods[method.name] = method
    return method


def _discover() -> None:
    for name in sorted(info.name for info in pkgutil.iter_modules(catalog.__path__)):
        module = importlib.import_module(f"{catalog.__name__}.{name}")
        for method in (module.METHOD, *getattr(module, "VARIANTS", ())):
            register_method(method)
        _explanations[module.METHOD.name] = module.__doc__ or ""
        if hasattr(module, "FACTORY"):
            _factories[module.METHOD.name] = module.FACTORY


_discover()
