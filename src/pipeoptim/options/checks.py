"""Checks of single options: ``check(name, value)`` returns the value, perhaps in another form, or raises ConfigError."""

from __future__ import annotations

import inspect
import operator
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, TypeGuard

from pipeoptim.errors import ConfigError, did_you_mean

MOST_SECONDS = 10**8
"""Three years: what waits takes no number as large as a float can be."""

Check = Callable[[str, Any], Any]


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}, must be True or False")
    return value


def function(what: str, arguments: int) -> Check:
    """Something that can be called with so many ``arguments``, or None."""

    def check(name: str, value: Any) -> Any:
        if value is not None and not callable(value):
            raise ConfigError(f"{name} is {value!r}, must be {what}, or None")
        if value is not None and not takes(value, arguments):
            raise ConfigError(f"{name} is {value!r}, which does not take {arguments} arguments; must be {what}, or None")
        return value

    return check


def takes(function: Callable[..., Any], arguments: int) -> bool:
    """Whether ``function`` can be called with so many positional ``arguments``; True where nothing can be known."""
    try:
        inspect.signature(function).bind(*range(arguments))
    except TypeError:
        return False
    except ValueError:  # builtins without a signature
        return True
    return True


def count(name: str, value: Any) -> int:
    """A whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} is {value!r}, must be an integer of at least 1")
    return value


def is_finite_number(value: Any) -> TypeGuard[float]:
    """Whether ``value`` is a number that fits a float. ``math.isfinite`` raises an error for larger integers."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def from_zero(name: str, value: Any) -> float:
    """A finite number of at least 0."""
    if not is_finite_number(value) or value < 0:
        raise ConfigError(f"{name} is {value!r}, must be a finite number, for example 1.0, or 0 for none")
    return value


def scale_or_auto(name: str, value: Any) -> float | str:
    """A factor on predictions, perhaps as text, or ``"auto"``."""
    if isinstance(value, str) and value == "auto":
        return value
    with suppress(ValueError, OverflowError):
        if isinstance(value, int | float | str) and not isinstance(value, bool) and 0 < float(value) <= 2:
            return float(value)
    raise ConfigError(
        f"{name} is {value!r}, must be a number above 0, at most 2, or 'auto'; to predict nothing: prediction='none'"
    )


def positive_or_none(name: str, value: Any) -> float | None:
    """A finite number above 0, or None for none."""
    if value is not None and not (is_finite_number(value) and value > 0):
        raise ConfigError(f"{name} is {value!r}, must be a finite number above 0, for example 10, or None")
    return value  # type: ignore[no-any-return]


def count_from_zero(name: str, value: Any) -> int:
    """A whole number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"{name} is {value!r}, must be an integer of at least 0")
    return value


def count_or_none(name: str, value: Any) -> int | None:
    """A whole number of at least 1, or None for the default."""
    return None if value is None else count(name, value)


def integer_or_none(name: str, value: Any) -> int | None:
    """Whatever counts as an integer, as numpy's do."""
    try:
        return None if value is None else operator.index(value)
    except TypeError:
        raise ConfigError(f"{name} is {value!r}, must be an integer, or None for torch's initial seed") from None


def seconds(name: str, value: Any) -> float:
    """A time above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MOST_SECONDS:
        raise ConfigError(f"{name} is {value!r}, must be a number of seconds above 0, at most {MOST_SECONDS:,}")
    return value


def seconds_or_none(name: str, value: Any) -> float | None:
    """A time above 0, or None for none."""
    return None if value is None else seconds(name, value)


def every_so_many(name: str, value: Any) -> bool | int:
    """A number of versions, or True for one that is chosen."""
    if not isinstance(value, int) or value < 0:
        raise ConfigError(f"{name} is {value!r}, must be True, False or a number of versions, for example 10")
    return value


def tied_places(name: str, value: Any) -> Any:
    """A list; its entries are read together with the program, which knows the stages."""
    if value is not None and (isinstance(value, str) or not isinstance(value, Sequence)):
        raise ConfigError(
            f"{name} is {value!r}, must be the tied of a partition, or a list that holds, for each tied weight, a list of (stage, "
            'name of the parameter): [[(0, "embed.weight"), (1, "head.weight")]]'
        )
    return value


def imported(target: str) -> Any:
    """What ``"module:name"`` names. Checks that belong to a feature live beside it, in modules that import torch."""
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


def read_by(target: str) -> Check:
    """The check is the function ``target``, ``f(value)``, which returns the value in the form that the engine uses."""
    return lambda _, value: imported(target)(value)


def passes(target: str) -> Check:
    """The check is the function ``target``, ``f(value)``, which returns nothing."""

    def check(_: str, value: Any) -> Any:
        imported(target)(value)
        return value

    return check


def one_of(known: Iterable[str]) -> Check:
    """One of some names."""

    def check(name: str, value: Any) -> Any:
        if not isinstance(value, str) or value not in known:
            raise ConfigError(f"{name} is {value!r}, must be one of {', '.join(known)}{did_you_mean(value, known)}")
        return value

    return check


def one_of_imported(target: str) -> Check:
    """One of the names in ``target``."""
    return lambda name, value: one_of(tuple(imported(target)))(name, value)


def instance(target: str, what: str) -> Check:
    """An object of the class ``target``, or None."""

    def check(name: str, value: Any) -> Any:
        if value is not None and not isinstance(value, imported(target)):
            raise ConfigError(f"{name} is a {type(value).__name__}, must be {what}")
        return value

    return check
