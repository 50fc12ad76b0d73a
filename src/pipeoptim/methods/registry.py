"""Finding methods: every module ``m_*.py`` of this package defines one as ``METHOD``, so a new method is one new file.

``VARIANTS`` in the same file are further forms of it, named ``method+option``; ``FACTORY`` is a function that makes the method
with options of the user's.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from types import MappingProxyType

from pipeoptim.errors import ConfigError
from pipeoptim.methods.method import Method

_methods: dict[str, Method] = {}

METHODS: Mapping[str, Method] = MappingProxyType(_methods)
"""name -> method, in alphabetical order of their files."""

_factories: dict[str, Callable[..., Method]] = {}

FACTORIES: Mapping[str, Callable[..., Method]] = MappingProxyType(_factories)
"""name -> function that makes the method with other options."""


def register_method(method: Method) -> Method:
    """Make ``method`` known by its name.

    Raises:
        ConfigError: the name is taken by a different method.
    """
    if _methods.get(method.name, method) != method:
        raise ConfigError(f"a method named {method.name!r} exists already; choose another name")
    _methods[method.name] = method
    return method


def _discover() -> None:
    import pipeoptim.methods as package

    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda i: i.name):
        if info.name.startswith("m_"):
            module = importlib.import_module(f"pipeoptim.methods.{info.name}")
            for method in (module.METHOD, *getattr(module, "VARIANTS", ())):
                register_method(method)
            if hasattr(module, "FACTORY"):
                _factories[module.METHOD.name] = module.FACTORY


_discover()
