"""From ``"module:function"`` (or ``"file.py:function"``) and options to an object, with errors that name the component."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from pipeoptim.config import Component
from pipeoptim.errors import ConfigError, PipeOptimError, unknown_name
from pipeoptim.user_code import import_target


def load(what: str, target: str) -> Callable[..., Any]:
    """The callable that ``target`` names.

    Raises:
        ConfigError: no such module, file or attribute.
    """
    where, colon, name = target.rpartition(":")
    if not (where and colon and name):
        raise ConfigError(f"{what} {target!r} is not of the form 'module:function' or 'file.py:function'")
    try:
        found = import_target(target)
    except (ImportError, OSError, SyntaxError, ValueError, TypeError) as error:  # the last two: a name that no module can have
        raise ConfigError(f"{what} {target!r} cannot be imported ({error}); install it, or correct the name") from error
    except AttributeError as error:
        raise ConfigError(f"{what} {target!r}: {where} has no {name!r}; correct the name") from error
    if not callable(found):
        raise ConfigError(f"{what} {target!r} is a {type(found).__name__}, must be a function or class")
    return found  # type: ignore[no-any-return]


def accepts(function: Callable[..., Any], name: str) -> bool:
    """Whether ``function`` can be given the keyword argument ``name``."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def accepts_all(what: str, function: Callable[..., Any], named: tuple[str, Mapping[str, Any]]) -> None:
    """Raises ConfigError where ``function`` has no argument for one of the options that it is named with."""
    name, options = named
    if unknown := next((option for option in options if not accepts(function, option)), None):
        raise unknown_name(f"option of {what} {name}", unknown, _arguments(function))


def _arguments(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "run"]


def call(what: str, function: Callable[..., Any], target: str, *args: Any, **options: Any) -> Any:
    """``function(*args, **options)``; what it refuses becomes a ConfigError that names the component."""
    try:
        return function(*args, **options)
    except PipeOptimError:
        raise
    # What torch refuses because of sizes is a RuntimeError.
    except (TypeError, ValueError, ArithmeticError, RuntimeError, ImportError, OSError) as error:
        given = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise ConfigError(f"{what} {target}({given}) cannot be made: {_line(error)}") from error


def build(what: str, component: Component, **defaults: Any) -> Any:
    """The object that ``component`` describes; ``defaults`` are passed only where it has such arguments."""
    function = load(what, component.target)
    extra = {name: value for name, value in defaults.items() if accepts(function, name)}
    return call(what, function, component.target, **{**extra, **component.options})


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
