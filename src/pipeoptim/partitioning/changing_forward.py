"""Models that decide in every forward anew which layers run, such as with LayerDrop: a stage needs all its layers in all of them."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pipeoptim.errors import ConfigError
from pipeoptim.partitioning.arguments import Inputs
from pipeoptim.partitioning.operation_log import ModuleExit, Operation, OperationLog, record_operations

_TRIES = 16  # with Python's or NumPy's random numbers: a layer dropped in 5 % shows with 99.99 % where there are 12 of them
_EXTREMES = (0.0, 1 - 2**-24)  # of what torch.rand draws: every probability above 0 and below 1 decides differently on them


def check_same_layers(model: nn.Module, inputs: Inputs, log: OperationLog, layers: Sequence[str]) -> None:
    """Refuse ``model`` if ``layers``, which ran in this order in the run of ``log``, need not run in every forward.

    Models draw a number for each layer also where they drop none, so not the draw is refused but what follows from it: where Python
    reads one of torch's random numbers, the model runs again with the extremes in place of them.

    Raises:
        ConfigError: a random number or the training mode decides which layers run.
    """
    changed = _difference(model, inputs, _order(log, layers), layers)
    if changed:
        raise ConfigError(
            f"the {type(model).__name__} does not run the same layers in every forward ({changed} differs), but a stage must run all of "
            "its layers, in training as in evaluation; switch this off before partitioning (with LayerDrop: set its probability to 0), "
            "or pass the list of its blocks, each of which may skip what it computes"
        )


def decides_at_random(log: OperationLog) -> bool:
    """Whether Python read a random number that depends on no input and no weight, as only a decision needs."""
    drawn: set[int] = set()
    data = set(log.inputs)
    for event in log.events:
        if not isinstance(event, Operation):
            continue
        if event.reads_value and drawn.intersection(event.inputs):
            return True
        if event.slots or data.intersection(event.inputs):
            data.update(event.outputs)  # dropout and noise that is added to activations: values, not decisions
            drawn.difference_update(event.outputs)
        elif event.random or drawn.intersection(event.inputs):
            drawn.update(event.outputs)
    return False


def _difference(model: nn.Module, inputs: Inputs, expected: list[str], layers: Sequence[str]) -> str:
    """What runs differently in training mode; empty where nothing does."""
    runs: list[tuple[int, float | None]] = [(0, None)]
    for seed, fill in runs:
        with _random_numbers_from(seed):
            begun = _state()
            try:
                log = record_operations(model, tuple(inputs[0]), inputs[1], training=True, uniform=fill)
            except ConfigError:
                return ""  # models that refuse to train on this sample are measured and checked as they are
            drew = _state() != begun
        found = _order(log, layers)
        if found != expected:
            return min(set(expected) ^ set(found), default="their order")
        if len(runs) == 1:
            runs += [(0, extreme) for extreme in _EXTREMES if decides_at_random(log)]
            runs += [(other, None) for other in range(1, _TRIES) if drew]
    return ""


def _order(log: OperationLog, layers: Sequence[str]) -> list[str]:
    return [event.name for event in log.events if isinstance(event, ModuleExit) and event.name in layers]


def _state() -> tuple[Any, ...]:
    """How far the random numbers of Python and NumPy have been drawn."""
    numpy: Any = sys.modules.get("numpy")
    if numpy is None:
        return (random.getstate(),)
    _, key, position, *_ = numpy.random.get_state()
    return random.getstate(), key.tobytes(), position


@contextmanager
def _random_numbers_from(seed: int) -> Iterator[None]:
    """Other random numbers inside than outside, which go on afterwards as if nothing had happened."""
    numpy: Any = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            random.seed(seed)
            if numpy is not None:
                numpy.random.seed(seed)
            yield
    finally:
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
