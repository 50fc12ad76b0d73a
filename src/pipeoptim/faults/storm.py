"""Random failures, the same for the same seed."""

from __future__ import annotations

import random

from pipeoptim.config import TrainConfig
from pipeoptim.errors import ConfigError
from pipeoptim.faults.promise import Promise, promise
from pipeoptim.faults.sentences import OF_MINI_BATCHES, Fault

_FROZEN_SHARE, _SECONDS = 0.1, 0.5  # of the failures, processes that stand still for a moment


def random_faults(config: TrainConfig, count: int, seed: int) -> list[Fault]:
    """So many failures that the run of ``config`` promises to survive, in the order in which they come.

    With ``survive`` they are anywhere in the run. With restarts only there is one between two checkpoints: attempts that gain nothing
    again and again are given up.

    Raises:
        ConfigError: the run promises nothing, or is too short for so many.
    """
    if promise(config, Fault("kill", "update", 0, 0)) is not Promise.SAME_BITS:
        raise ConfigError(
            "a run that ends with the first process that dies has no storm; give --survive K or --max-restarts N after --"
        )
    chance = random.Random(seed)
    period = 1 if config.survive else config.checkpoint_every or config.steps
    slots = range(1, config.steps // period) if config.survive else range(config.steps // period)
    if count > len(slots):
        each = "mini-batch" if config.survive else "checkpoint"
        raise ConfigError(
            f"storm is {count}, but the run has room for {len(slots)}, one per {each}; ask for fewer, or train longer"
        )
    return [_draw(config, chance, slot * period + chance.randrange(period)) for slot in sorted(chance.sample(slots, count))]


def _draw(config: TrainConfig, chance: random.Random, mini_batch: int) -> Fault:
    stage, events = chance.randrange(config.stages), OF_MINI_BATCHES if config.stages > 1 else OF_MINI_BATCHES[:-1]
    event = chance.choice(events)
    if chance.random() < _FROZEN_SHARE:
        return Fault("freeze", event, mini_batch, stage, _SECONDS)
    return Fault("kill", event, mini_batch, stage)
