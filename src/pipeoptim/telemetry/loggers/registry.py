"""Finds the loggers: every file of this package with a ``LOGGER``."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeoptim.errors import ConfigError, unknown_name
from pipeoptim.telemetry.loggers.run_logger import RunLogger

_PACKAGE = __name__.rpartition(".")[0]

LOGGERS = {
    info.name: module
    for info in pkgutil.iter_modules([str(Path(__file__).parent)])
    if info.name not in ("registry", "run_logger")
    for module in [importlib.import_module(f"{_PACKAGE}.{info.name}")]
}
"""name -> module, with ``LOGGER`` and ``PACKAGE``."""


def logger_class(name: str) -> Callable[..., RunLogger]:
    """What makes the logger called ``name``.

    Raises:
        ConfigError: there is none.
    """
    if name not in LOGGERS:
        raise unknown_name("logger", name, LOGGERS, more=", or module:Class for one of your own")
    made: Any = LOGGERS[name].LOGGER
    return made  # type: ignore[no-any-return]


def check_installed(name: str) -> None:
    """Raises ConfigError where the package of a logger is not installed."""
    package = LOGGERS[name].PACKAGE
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{package} is not installed, which logger {name} needs; pip install 'pipeoptim[{name}]', or leave {name} out"
        )
