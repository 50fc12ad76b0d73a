"""``method="auto"`` of a run: settled once, before the run directory is written, so that a resumed run keeps what was found."""

from __future__ import annotations

import inspect
import sys
from dataclasses import replace

from pipeoptim.advise import automatic
from pipeoptim.config import Component, TrainConfig
from pipeoptim.errors import ConfigError
from pipeoptim.options import DEFAULTS
from pipeoptim.schedule import AUTO


def settled(config: TrainConfig, prediction: str | None = None) -> TrainConfig:
    """``config`` with the method and kind of prediction that "auto" stands for; itself under any other method.

    Args:
        config: of a run.
        prediction: the kind that the user asked for; by default that of ``config``, where it is not the usual one.

    Raises:
        ConfigError: the optimizers of the stages call for different methods.
    """
    if config.method != AUTO:
        return config
    from pipeoptim.train.change_method import with_method

    if prediction is None and config.prediction != DEFAULTS.prediction:
        prediction = config.prediction
    found = {automatic(config.stages, config.microbatches, momentum, prediction) for momentum in momenta(config.optimizer)}
    if len(found) > 1:
        raise ConfigError(
            f"method is {AUTO!r}, but optimizer {config.optimizer.target!r} calls for different ones by stage; name one"
        )
    (choice,) = found
    print(choice.line, file=sys.stderr)
    config = with_method(config, choice.method)
    return config if choice.prediction is None else replace(config, prediction=choice.prediction)


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
