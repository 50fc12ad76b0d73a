"""What every phase of a model costs: seconds of F and B, bytes kept for the backward, from runs of the whole model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeoptim.engine.transport.pytree import differentiable
from pipeoptim.errors import ConfigError
from pipeoptim.partitioning.arguments import Inputs
from pipeoptim.partitioning.block_costs import arriving, drop_gradients, minibatch, nbytes, undisturbed, wait


class _Clock:
    """When each phase ended in F, and when the gradient of its end was there in B."""

    def __init__(self, count: int) -> None:
        self.forward: list[float] = []
        self.backward: dict[int, float] = {}
        self.outputs = [0] * count
        self.kept: list[dict[int, int]] = [{} for _ in range(count + 1)]
        self.noting = False

    def layer_ends(self, i: int) -> Callable[[Any, Any, Any], None]:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            wait()  # a device computes asynchronously: without this, the time of a layer would count for a later one
            self.forward.append(time.perf_counter())
            self.outputs[i] = nbytes(output)
            first = next(iter(differentiable(output)), None)
            if first is not None:
                first.register_hook(lambda _: self._arrives(i))  # type: ignore[no-untyped-call]

        return hook

    def _arrives(self, i: int) -> None:
        wait()
        self.backward[i] = time.perf_counter()

    def keep(self, weights: set[int]) -> Callable[[Tensor], Tensor]:
        def note(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if self.noting and storage.data_ptr() not in weights:
                self.kept[len(self.forward)].setdefault(storage.data_ptr(), storage.nbytes())
            return t

        return note


@torch.enable_grad()
def measure(
    model: nn.Module, layers: Sequence[str], inputs: Inputs, microbatches: int = 1, repeats: int = 7
) -> list[tuple[float, float, int, int]]:
    """Per phase: seconds of F, seconds of B, bytes of what its layer returns, bytes that autograd keeps. Of
    ``repeats`` mini-batches the median, after a micro-batch that counts bytes and no time; every mini-batch makes new gradients."""
    runs = []
    with undisturbed(model):
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        for number in range(1 + repeats * microbatches):
            if number == 0 or number % microbatches == 1 % microbatches:
                drop_gradients(model)
            clock = _Clock(len(layers))
            clock.noting = number == 0
            seconds = _run(model, layers, inputs, clock, weights)
            if number == 0:
                noted = clock
            else:
                runs.append(seconds)
    seen: set[int] = set()
    result = []
    for i in range(len(layers) + 1):
        new = {key: size for key, size in noted.kept[i].items() if key not in seen}
        seen |= set(new)
        sent = noted.outputs[i] if i < len(layers) else 0
        forward, backward = (minibatch([run[i][part] for run in runs], microbatches) for part in range(2))
        result.append((forward, backward, sent * microbatches, sum(new.values()) * microbatches))
    return result


def _run(
    model: nn.Module, layers: Sequence[str], inputs: Inputs, clock: _Clock, weights: set[int]
) -> list[tuple[float, float]]:
    handles = [model.get_submodule(name).register_forward_hook(clock.layer_ends(i)) for i, name in enumerate(layers)]
    try:
        wait()
        start = time.perf_counter()
        if clock.noting:
            with torch.autograd.graph.saved_tensors_hooks(clock.keep(weights), lambda t: t):
                output = model(*inputs[0], **inputs[1])
        else:
            output = model(*inputs[0], **inputs[1])
        wait()
        turn = time.perf_counter()
        roots, gradients = arriving(output)
        wait()
        back = time.perf_counter()
        if roots:
            torch.autograd.backward(roots, gradients)
        wait()
        end = time.perf_counter()
    finally:
        for handle in handles:
            handle.remove()
    if len(clock.forward) != len(layers):
        raise ConfigError(
            f"the {type(model).__name__} ran {len(clock.forward)} of its {len(layers)} layers in one forward and all of them in another, "
            "but a stage must run all of its layers; switch this off before partitioning"
        )
    ends = [start, *clock.forward, turn]
    arrivals = [end, *(clock.backward.get(i, end) for i in range(len(layers))), back]
    # Phase i's backward lasts from the arrival of the gradient of its end to that of the end of the phase before.
    return [(ends[i + 1] - ends[i], max(0.0, arrivals[i] - arrivals[i + 1])) for i in range(len(layers) + 1)]
