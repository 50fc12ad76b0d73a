"""Finds the callbacks that come along: every file of this package with a ``CALLBACK``."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path

from pipeoptim.errors import ConfigError, unknown_name
from pipeoptim.named_calls import read_calls
from pipeoptim.train.callbacks.callback import Callback
from pipeoptim.train.targets import accepts_all, call, load

_PACKAGE = __name__.rpartition(".")[0]

CALLBACKS: dict[str, type[Callback]] = {
    info.name: importlib.import_module(f"{_PACKAGE}.{info.name}").CALLBACK
    for info in pkgutil.iter_modules([str(Path(__file__).parent)])
    if info.name not in ("callback", "registry")
}
"""name -> class."""


def make_callbacks(text: str) -> list[Callback]:
    """Those that ``text`` names, as ``early_stopping(patience=3),mine:Report``.

    Raises:
        ConfigError: one is unknown, is no callback, or refuses its options.

    Example:
        >>> [type(one).__name__ for one in make_callbacks("early_stopping(patience=3)")]
        ['EarlyStopping']
    """
    return [_made(named.name, named.options) for named in read_calls("callback", text)]


def _made(name: str, options: dict[str, object]) -> Callback:
    if ":" not in name and name not in CALLBACKS:
        raise unknown_name("callback", name, CALLBACKS, more=", or module:Class for one of your own")
    make: Callable[..., Callback] = load("callback", name) if ":" in name else CALLBACKS[name]
    accepts_all("callback", make, (name, options))
    made = call("callback", make, name, **options)
    if not isinstance(made, Callback):
        raise ConfigError(
            f"callback {name!r} is a {type(made).__name__}, must be a subclass of pipeoptim.train.callbacks.Callback"
        )
    return made
