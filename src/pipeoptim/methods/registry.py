"""Finding methods: every module ``m_*.py`` of this package defines one as ``METHOD``, so a new method is one new file.

``VARIANTS`` in the same file are further forms of it, named ``method+option``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from difflib import get_close_matches
from types import MappingProxyType

from pipeoptim.errors import ConfigError
from pipeoptim.methods.method import Method

_methods: dict[str, Method] = {}

METHODS: Mapping[str, Method] = MappingProxyType(_methods)
"""name -> method, in alphabetical order of their files."""


def register_method(method: Method) -> Method:
    """Make ``method`` known by its name.

    Raises:
        ConfigError: the name is taken by a different method.
    """
    if _methods.get(method.name, method) != method:
        raise ConfigError(f"a method named {method.name!r} exists already; choose another name")
    _methods[method.name] = method
    return method


def get_method(method: str | Method) -> Method:
    """The method of that name, or the one given.

    Raises:
        ConfigError: unknown name; the message lists the known ones.

    Example:
        >>> get_method("pipeoptim").order
        'async_1f1b'
    """
    if isinstance(method, Method):
        return method
    if method not in _methods:
        close = get_close_matches(str(method), _methods, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(f"unknown method {method!r}; {hint}known: {', '.join(sorted(_methods))}")
    return _methods[method]


def _discover() -> None:
    import pipeoptim.methods as package

    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda i: i.name):
        if info.name.startswith("m_"):
            module = importlib.import_module(f"pipeoptim.methods.{info.name}")
            for method in (module.METHOD, *getattr(module, "VARIANTS", ())):
                register_method(method)


_discover()
