"""``method="auto"``: which method a pipeline trains by, from what all of its processes know."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch.optim import Optimizer

from pipeoptim.advise import Settled, automatic
from pipeoptim.engine.effects import check_optimizer, planned
from pipeoptim.errors import ConfigError
from pipeoptim.methods import Method
from pipeoptim.options import DEFAULTS, PipelineOptions
from pipeoptim.schedule import AUTO

LOG = logging.getLogger("pipeoptim")


def momentum_of(optimizer: Optimizer | None) -> float | None:
    """The largest momentum of its groups: mu, or the first beta; 0 for none, None without an optimizer.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> momentum_of(torch.optim.AdamW([weight])), momentum_of(torch.optim.SGD([weight]))
        (0.9, 0.0)
    """
    groups = getattr(optimizer, "param_groups", None)  # what is no optimizer is refused later, by the stage
    return groups and max(float(group.get("momentum") or group.get("betas", (0.0,))[0]) for group in groups)


def settle_options(
    read: Callable[[str | Method], PipelineOptions],
    method: str | Method,
    prediction: str | None,
    optimizers: Sequence[Optimizer | None],
    depth: int,
    processes: int | None = None,
) -> PipelineOptions:
    """The options that ``read`` makes for a method; of "auto" for what that stands for, which no other option rules out.

    Processes do not ask each other: they compare what came out, with all other settings, when they connect.

    Args:
        read: gives the options of the pipeline with a method.
        method: as it was given.
        prediction: the kind that was asked for; None for none.
        optimizers: of the stages of this process.
        depth, processes: of the pipeline.

    Raises:
        ConfigError: the optimizers of the stages call for different methods, or the options rule out all.
    """
    if not isinstance(method, str) or method != AUTO:
        return read(method)
    given = read(DEFAULTS.method)  # in the place of the method that is not known yet

    def with_method(name: str, kind: str | None) -> PipelineOptions:
        return replace(given, method=name, prediction=given.prediction if kind is None else kind)

    def settled(optimizer: Optimizer | None) -> Settled:
        def check(name: str, kind: str | None) -> None:
            options = with_method(name, kind)
            chosen, program = planned(options, depth, processes)
            check_optimizer(optimizer, chosen, program, options.prediction)

        return automatic(depth, given.microbatches, momentum_of(optimizer), prediction, check)

    found = {one[:2]: one for one in map(settled, optimizers)}  # reasons may differ
    if len(found) > 1:
        names = " and ".join(sorted(f"{name} ({kind})" for name, kind in found))
        raise ConfigError(
            f"method is {AUTO!r}, but the optimizers of the stages call for different ones, {names}; name one of them"
        )
    (choice,) = found.values()
    LOG.info(choice.line)
    return with_method(choice.method, choice.prediction)
