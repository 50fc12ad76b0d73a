"""Models that decide in every forward anew which layers run, such as with LayerDrop: a stage needs all its layers in all of them.

What decides may be a random number of torch, Python or NumPy, or something that the model itself holds and changes: a counter, a generator
of its own. So one copy of the model runs several times, and keeps what it holds from run to run.
"""

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
from pipeoptim.partitioning.operation_log import ModuleExit, Operation, OperationLog, record_run
from pipeoptim.partitioning.weight_slots import shadow_copy

_TRIES = 16  # where something else than torch's numbers decides: a layer dropped in 5 % shows with 99.99 % where there are 12 of them
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
    twin = shadow_copy(model)
    # Layers that were dropped in the first run of all are not among `layers`, but stand beside one of them.
    beside = {name.rpartition(".")[0] for name in layers}
    watched = [name for name, _ in model.named_modules() if name and name.rpartition(".")[0] in beside]
    trained: list[str] | None = None
    runs: list[tuple[int, float | None]] = [(0, None), (0, None)]  # twice alike: a counter would tell them apart
    for seed, fill in runs:
        with _random_numbers_from(seed):
            begun = _state(twin)
            try:
                log = record_run(twin, tuple(inputs[0]), inputs[1], training=True, uniform=fill)
            except ConfigError:
                return ""  # models that refuse to train on this sample are measured and checked as they are
            changed = _state(twin) != begun
        found, ran = _order(log, layers), _order(log, watched)
        if found != expected:
            return min(set(expected) ^ set(found), default="their order")
        # Beside the layers training may run others than evaluation, an auxiliary head for instance, but always the same.
        if trained not in (None, ran):
            return min(set(trained or ()) ^ set(ran), default="their order")
        if trained is not None and len(runs) == 2:  # in the second run, for the first one may fill a cache
            runs += [(0, extreme) for extreme in _EXTREMES if decides_at_random(log)]
            runs += [(other, None) for other in range(1, _TRIES) if changed]
        trained = ran
    return ""


def _order(log: OperationLog, layers: Sequence[str]) -> list[str]:
    return [event.name for event in log.events if isinstance(event, ModuleExit) and event.name in layers]


def _state(twin: nn.Module) -> list[Any]:
    """How far random numbers have been drawn, those of Python, of NumPy and of ``twin``, and the plain values that its modules hold."""
    held = [_plain(value) for module in twin.modules() for value in vars(module).values()]
    numpy: Any = sys.modules.get("numpy")
    if numpy is None:
        return [held, random.getstate()]
    _, key, position, *_ = numpy.random.get_state()
    return [held, random.getstate(), key.tobytes(), position]


def _plain(value: Any) -> Any:
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, random.Random):
        return value.getstate()
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.random.Generator):
        return repr(value.bit_generator.state)
    return None


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
