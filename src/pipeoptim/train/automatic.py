"""``method="auto"`` of a run: settled once, before the run directory is written, so that a resumed run keeps what was found."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipeoptim.advise import Settled, automatic
from pipeoptim.config import Component, TrainConfig
from pipeoptim.errors import ConfigError
from pipeoptim.options import RUN_SETTINGS
from pipeoptim.schedule import AUTO


def settled(config: TrainConfig, given: Mapping[str, Any] | None = None) -> TrainConfig:
    """``config`` with the method and kind of prediction that "auto" stands for; itself under any other method.

    Args:
        config: of a run.
        given: settings that the user asked for, which the method must be able to take; others, of a recipe, are dropped where a method has
            no use for them. By default all that are not the usual ones.

    Raises:
        ConfigError: the optimizers of the stages call for different methods, or what is given rules out all methods.
    """
    if config.method != AUTO:
        return config
    from pipeoptim.train.change_method import with_method
    from pipeoptim.train.checks import check_method

    if given is None:
        given = {name: getattr(config, name) for name, known in RUN_SETTINGS.items() if getattr(config, name) != known.default}
    asked: dict[str, Any] = {name: value for name, value in given.items() if name in RUN_SETTINGS}
    prediction = asked.pop("prediction", None)

    def changed(method: str, kind: str | None) -> TrainConfig:
        kept: dict[str, Any] = asked if kind is None else {**asked, "prediction": kind}
        return replace(with_method(config, method), **kept)

    def found_for(momentum: float) -> Settled:
        return automatic(
            config.stages, config.microbatches, momentum, prediction, lambda *choice: check_method(changed(*choice))
        )

    found = {found_for(momentum) for momentum in momenta(config.optimizer)}
    if len(found) > 1:
        raise ConfigError(
            f"method is {AUTO!r}, but optimizer {config.optimizer.target!r} calls for different ones by stage; name one"
        )
    (choice,) = found
    print(choice.line, file=sys.stderr)
    return changed(choice.method, choice.prediction)


def kept(config: TrainConfig, before: TrainConfig) -> TrainConfig:
    """``config`` of a run that exists, with what "auto" stood for when it was begun."""
    return replace(config, method=before.method, prediction=before.prediction) if config.method == AUTO else config


def momenta(optimizer: Component) -> set[float]:
    """Momentum of each stage's optimizer: mu, or the first beta, as given or by default; 0 for none.

    Example:
        >>> momenta(Component("adamw")), momenta(Component("momentum")), momenta(Component("sgd,adamw")) == {0.0, 0.9}
        ({0.9}, {0.9}, True)
    """
    from pipeoptim.train.optimizers import resolve_each

    found = set()
    for _, function, own in resolve_each(optimizer.target):
        usual = {name: p.default for name, p in inspect.signature(function).parameters.items()}
        options = {**usual, **own, **optimizer.options}
        betas = options.get("betas")
        mu = options.get("momentum") or (betas[0] if isinstance(betas, (list, tuple)) and betas else 0.0)
        found.add(float(mu) if isinstance(mu, (int, float)) else 0.0)
    return found
