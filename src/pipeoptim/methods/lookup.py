"""Looks up what a user types: a method's name, a name with options, or a method in a file of the user's own."""

from __future__ import annotations

import ast
import inspect
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from pipeoptim.errors import ConfigError, unknown_name
from pipeoptim.methods.method import Method
from pipeoptim.methods.registry import FACTORIES, METHODS
from pipeoptim.user_code import import_target


def get_method(method: str | Method) -> Method:
    """The method that ``method`` stands for.

    Args:
        method: a name in ``METHODS``; a name with options, ``pipemare(synchronous_updates=100)``; ``module:NAME`` or
            ``file.py:NAME``, a :class:`Method` of your own; or a method itself.

    Raises:
        ConfigError: there is no such method; the message lists the known ones.

    Example:
        >>> get_method("pipeoptim").order
        'async_1f1b'
        >>> get_method("pipemare(synchronous_updates=100)").synchronous_updates
        100
    """
    return method if isinstance(method, Method) else _method_called(str(method))


@lru_cache(maxsize=256)
def _method_called(text: str) -> Method:
    if text in METHODS:
        return METHODS[text]
    if "(" in text:
        return _with_options(text)
    if ":" in text:
        return _from_file(text)
    raise _unknown_method(text)


def _unknown_method(text: str) -> ConfigError:
    if text == "auto":
        return ConfigError(
            "method 'auto' is settled by pipelines and pipeoptim train only, which know depth, M and optimizer; name a method here: "
            "pipeoptim advise says which"
        )
    close = get_close_matches(text, METHODS, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return ConfigError(f"unknown method {text!r}; {hint}known: {', '.join(sorted(METHODS))}")


def _with_options(text: str) -> Method:
    try:
        # Literals only, never eval: the text may come from a configuration that somebody else wrote.
        call = ast.parse(text, mode="eval").body
        assert isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args
        options: dict[str, Any] = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError, AssertionError):
        raise ConfigError(f"method {text!r} cannot be read; write it as name(option=value, ...)") from None
    name = call.func.id
    if name not in FACTORIES:
        raise (
            _unknown_method(name)
            if name not in METHODS
            else ConfigError(f"method {name!r} has no options; leave out the brackets")
        )
    known = inspect.signature(FACTORIES[name]).parameters
    for option in options:
        if option not in known:
            raise unknown_name(f"{name} option", option, known, more=f"; pipeoptim methods {name} explains them")
        if isinstance(known[option].default, bool) and not isinstance(options[option], bool):
            raise ConfigError(f"method {text!r}: {option} is {options[option]!r}, must be True or False")
    try:
        return FACTORIES[name](**options)
    except TypeError as error:
        raise ConfigError(f"method {text!r}: {str(error).split(') ', 1)[-1]}") from None


def _from_file(text: str) -> Method:
    try:
        found = import_target(text)
    except (
        ImportError,
        OSError,
        AttributeError,
        SyntaxError,
        ValueError,
        TypeError,
    ) as error:  # the last two: a name that no module can have
        raise ConfigError(f"method {text!r} cannot be loaded: {error}; write module:NAME or file.py:NAME") from None
    if not isinstance(found, Method):
        raise ConfigError(f"method {text!r} is a {type(found).__name__}, must be a pipeoptim.Method")
    return found
