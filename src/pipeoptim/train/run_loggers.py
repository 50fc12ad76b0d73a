"""The loggers that a run's settings name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

from pipeoptim.config import TrainConfig
from pipeoptim.errors import ConfigError
from pipeoptim.named_calls import NamedCall, read_calls
from pipeoptim.telemetry.loggers import LOGGERS, LoggedRun, RunLogger, check_installed, logger_class
from pipeoptim.train.rundir import RunDir
from pipeoptim.train.targets import accepts_all, call, load


def check_loggers(config: TrainConfig) -> None:
    """Raises ConfigError where one is unknown, not installed, or does not have an option."""
    for named in _named(config):
        make = _maker(named)
        if named.name in LOGGERS:
            check_installed(named.name)
        accepts_all("logger", make, named)


def open_loggers(config: TrainConfig, run: RunDir, start: int) -> Iterator[tuple[str, RunLogger]]:
    """Name and logger, one after the other, of the session of ``run`` that begins after ``start`` mini-batches."""
    told = LoggedRun(run.path.name, run.path, start, json.loads(config.to_json()))
    for named in _named(config):
        yield named.name, call("logger", _maker(named), named.name, told, **named.options)


def _named(config: TrainConfig) -> list[NamedCall]:
    named = read_calls("logger", config.loggers)
    if config.tensorboard and not any(one.name == "tensorboard" for one in named):
        named.append(NamedCall("tensorboard", {}))
    if len({one.name for one in named}) < len(named):
        raise ConfigError(f"loggers is {config.loggers!r}, must name each logger once")
    return named


def _maker(named: NamedCall) -> Callable[..., RunLogger]:
    return load("logger", named.name) if ":" in named.name else logger_class(named.name)
