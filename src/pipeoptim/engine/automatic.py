"""``method="auto"``: which method a pipeline trains by, from what all of its processes know."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch.optim import Optimizer

from pipeoptim.advise import automatic
from pipeoptim.errors import ConfigError
from pipeoptim.methods import Method
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


def settle_method(
    method: str | Method, depth: int, microbatches: int, optimizers: Sequence[Optimizer | None], prediction: str | None
) -> tuple[str | Method, str | None]:
    """``method`` and ``prediction`` as they were given, or what "auto" stands for; None where no kind was named.

    Processes do not ask each other: they compare what came out, with all other settings, when they connect.

    Raises:
        ConfigError: the optimizers of the stages call for different methods.
    """
    if not isinstance(method, str) or method != AUTO:
        return method, prediction
    found = {automatic(depth, microbatches, momentum_of(optimizer), prediction) for optimizer in optimizers}
    if len(found) > 1:
        names = " and ".join(sorted({f"{settled.method} ({settled.prediction})" for settled in found}))
        raise ConfigError(
            f"method is {AUTO!r}, but the optimizers of the stages call for different ones, {names}; name one of them"
        )
    (settled,) = found
    LOG.info(settled.line)
    return settled.method, settled.prediction
