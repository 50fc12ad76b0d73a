"""Learning-rate schedules by name, each a ``torch.optim.lr_scheduler``: one per stage, advanced once per update.

They are all ``LambdaLR``: a closed form of the number of updates, so that a resumed run and a pipeline whose stages are
at different versions see exactly the rate of their own update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from pipeoptim.config import Component
from pipeoptim.errors import ConfigError, unknown_name
from pipeoptim.train.targets import accepts, call, load


def constant() -> Callable[[int], float]:
    """1 at every update."""
    return lambda _: 1.0


def cosine(steps: int, warmup: int = 0, final: float = 0.0) -> Callable[[int], float]:
    """Linear warm-up over ``warmup`` updates, then half a cosine from 1 to ``final`` at update ``steps``.

    >>> f = cosine(steps=10, warmup=2, final=0.1)
    >>> [round(f(t), 2) for t in (0, 1, 2, 6, 10, 99)]
    [0.5, 1.0, 1.0, 0.55, 0.1, 0.1]
    """
    _check("warmup", warmup, 0, None)
    if warmup > steps:
        raise ConfigError(
            f"warmup is {warmup} in lr_schedule, must be at most {steps}, the steps of the run; set steps to {warmup} or more"
        )
    if not 0 <= final <= 1:
        raise ConfigError(f"final is {final!r} in lr_schedule cosine, must be between 0 and 1, a share of lr")

    def factor(t: int) -> float:
        if t < warmup:
            return (t + 1) / warmup
        progress = min(1.0, (t - warmup) / max(1, steps - warmup))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def step(every: int, gamma: float = 0.1) -> Callable[[int], float]:
    """Times ``gamma`` after every ``every`` updates.

    >>> f = step(every=3, gamma=0.5)
    >>> [f(t) for t in (0, 2, 3, 6)]
    [1.0, 1.0, 0.5, 0.25]
    """
    _check("every", every, 1, None)
    return lambda t: float(gamma ** (t // every))


def milestones(steps: int, at: Sequence[int], of: int, gamma: float = 0.1) -> Callable[[int], float]:
    """Times ``gamma`` at each of the points ``at`` of a run whose ``steps`` updates count as ``of``: epochs, or percent.

    Update t is past point m where ``t * of >= m * steps``; whole numbers, so that it is exactly the first update of epoch m.

    >>> f = milestones(steps=700, at=[40, 60], of=70)
    >>> [round(f(t), 4) for t in (0, 399, 400, 599, 600)]
    [1.0, 1.0, 0.1, 0.1, 0.01]
    """
    _check("of", of, 1, None)
    for point in at:
        _check("at", point, 0, of)
    return lambda t: float(gamma ** sum(t * of >= point * steps for point in at))


SCHEDULES: dict[str, Callable[..., Callable[[int], float]]] = {
    "constant": constant,
    "cosine": cosine,
    "milestones": milestones,
    "step": step,
}


def factory(component: Component, steps: int) -> Callable[[Optimizer], LRScheduler]:
    """A function that makes the scheduler of one stage from its optimizer.

    ``module:function`` names a function of the optimizer (plus options) that returns a scheduler. A schedule with an
    argument ``steps`` gets the length of the run.

    Raises:
        ConfigError: unknown name or wrong options.
    """
    if ":" in component.target:
        own = load("lr_schedule", component.target)
        return lambda optimizer: call("lr_schedule", own, component.target, optimizer, **component.options)  # type: ignore[no-any-return]
    if component.target not in SCHEDULES:
        raise unknown_name("lr_schedule", component.target, SCHEDULES, more=", or 'module:function'")
    shape = SCHEDULES[component.target]
    options: dict[str, Any] = dict(component.options)
    if accepts(shape, "steps"):
        options.setdefault("steps", steps)
    factor: Callable[[int], float] = call("lr_schedule", shape, component.target, **options)
    return lambda optimizer: LambdaLR(optimizer, factor)


def depends_on_length(component: Component) -> bool:
    """Whether the schedule depends on the length of the run."""
    shape = SCHEDULES.get(component.target)
    return shape is not None and accepts(shape, "steps") and "steps" not in component.options


def _check(name: str, value: int, least: int, most: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        upto = f" and at most {most}" if most is not None else ""
        raise ConfigError(f"{name} is {value!r} in lr_schedule, must be an integer of at least {least}{upto}")
