"""What a configuration promises when a failure happens, and which failures can happen in its run at all."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from pipeoptim.config import TrainConfig
from pipeoptim.errors import ConfigError, counted
from pipeoptim.faults.sentences import Fault

LIVENESS = 10.0
"""Seconds after which a process that stands still counts as dead."""

MOST_FROZEN = 600.0


class Promise(Enum):
    """How a run ends that a failure has hit."""

    SAME_BITS = "as if nothing had happened"
    GOES_ON = "trained to the end"
    NOTHING = "may end"


def promise(config: TrainConfig, fault: Fault) -> Promise:
    """Of the run of ``config``."""
    if fault.kind == "nan":
        return Promise.NOTHING if config.on_bad == "stop" else Promise.GOES_ON
    if not _is_noticed(config, fault):
        return Promise.NOTHING
    survives = config.survive and fault.kind != "disk"  # an exception would come again in the image
    return Promise.SAME_BITS if _is_outlasted(config, fault) or survives or config.max_restarts else Promise.NOTHING


def needs_restart(config: TrainConfig, fault: Fault) -> bool:
    """Whether all processes are started again, if it is survived."""
    if fault.kind == "nan" or not _is_noticed(config, fault) or _is_outlasted(config, fault):
        return False
    return not config.survive or fault.kind == "disk"


def _is_noticed(config: TrainConfig, fault: Fault) -> bool:
    """Flipped bits are not, but where the update is made twice."""
    return fault.kind != "flip_gradient" and (fault.kind != "flip_weights" or audited(config.audit, fault.number))


def audited(every: int, update: int) -> bool:
    """Whether the update of mini-batch ``update`` is made again; every: of the audit, 0 for none."""
    return every > 0 and (update + 1) % every == 0


def _is_outlasted(config: TrainConfig, fault: Fault) -> bool:
    """A process that stands still, but nobody takes it for dead."""
    return fault.kind == "freeze" and (fault.seconds < LIVENESS / 2 or config.engine == "emulator")


def step_of(config: TrainConfig, fault: Fault) -> int:
    """The mini-batches that are done when an image, a validation or a checkpoint comes; the mini-batch's number for other events."""
    every = _every(config, fault.event)
    return fault.number if every is None else min(config.steps, fault.number * every)


def check_possible(config: TrainConfig, faults: Sequence[Fault]) -> None:
    """Raises ConfigError for a failure that cannot happen in the run of ``config``."""
    for fault in faults:
        every, most = _every(config, fault.event), config.steps - 1
        if fault.stage is not None and fault.stage >= config.stages:
            raise ConfigError(f"{str(fault)!r}: the run has stages 0 .. {config.stages - 1}; name one of them")
        if fault.event == "send" and config.stages == 1:
            raise ConfigError(f"{str(fault)!r}: a single stage sends nothing; name another event")
        if fault.event == "image" and not config.survive:
            raise ConfigError(
                f"{str(fault)!r}: processes leave images of themselves with --survive only; give it, or name another event"
            )
        if every is not None:
            most = (config.steps - 1) // every if fault.event == "image" else -(-config.steps // every)
            if not 1 <= fault.number <= most:
                raise ConfigError(f"{str(fault)!r}: the run has {counted(most, fault.event)}, counted from 1; name one of them")
        elif fault.number > most:
            raise ConfigError(f"{str(fault)!r}: the run has mini-batches 0 .. {most}; name one of them")
        if fault.kind == "freeze" and not 0 < fault.seconds <= MOST_FROZEN:
            raise ConfigError(f"{str(fault)!r}: seconds must be above 0, at most {MOST_FROZEN:g}")
    if repeated := next((fault for n, fault in enumerate(faults) if fault in faults[:n]), None):
        raise ConfigError(f"{str(repeated)!r} is said twice; leave one out")
    restarts = sum(needs_restart(config, fault) for fault in faults)
    if config.max_restarts and restarts > config.max_restarts:
        raise ConfigError(
            f"{counted(restarts, 'failure')} need a restart each, but max_restarts is {config.max_restarts}; raise --max-restarts"
        )


def _every(config: TrainConfig, event: str) -> int | None:
    """Mini-batches between two of these events; None for what every mini-batch has. All but images come at the end of a run as well."""
    every = {"image": config.survive, "validation": config.eval_every, "checkpoint": config.checkpoint_every}.get(event)
    return config.steps if every == 0 else every
