"""A stage of an ordinary model: the model's own forward, of which it runs its part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from pipeoptim.errors import ConfigError, PipeOptimError
from pipeoptim.partitioning.absent_tensor import AbsentTensor
from pipeoptim.partitioning.arguments import bind_arguments, first_device, pack_inputs, parameters, unpack_inputs
from pipeoptim.partitioning.weight_slots import WeightSlot


class _Reached(BaseException):
    """The last layer of the stage has returned. Not an ``Exception``, so that no model catches it."""

    def __init__(self, value: Any) -> None:
        self.value = value


class LayerStage(nn.Module):
    """Layers ``start .. end-1`` of a model, with what comes before them on the first stage and after them on the last.

    The first stage takes the model's own arguments. It returns ``(value, inputs)``: what its last layer returned, and the
    arguments; those that later stages need only for their shape travel as a few numbers. The next stage takes these two, and
    keyword arguments of the model, which replace those that came. The last stage returns what the model returns.

    What comes before the layers also makes what each of them needs, such as masks and rotary embeddings. So every stage runs
    that code again, from the arguments; whatever in it depends on the weights of other stages is skipped (see
    :class:`~pipeoptim.partitioning.absent_tensor.AbsentTensor`).

    Args:
        model: a copy of the model's structure, for this stage alone.
        layers: names of all layers.
        start, end: those of this stage.
        last: whether it also runs what comes after the layers.
        form_only: arguments that later stages need only for their shape.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], start: int, end: int, last: bool, form_only: set[str]) -> None:
        super().__init__()
        self.model, self.start, self.end, self.last = model, start, end, last
        self._form_only = form_only
        self._received: Any = None
        self._entered = start == 0  # whether the layer before this stage's own was called in this forward
        self._absent: list[WeightSlot] = []
        for i, name in enumerate(layers):
            if not start <= i < end:
                _remove_contents(model.get_submodule(name), self._resumed if i == start - 1 else self._skipped)
        if not last:
            model.get_submodule(layers[end - 1]).register_forward_hook(_stop)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.start == 0:
            inputs = bind_arguments(parameters(self.model), args, kwargs)
        else:
            self._received, travelled = args
            self._entered = False
            inputs = unpack_inputs(travelled, first_device(self._received))
            inputs[1].update(kwargs)
        try:
            output = self.model(*inputs[0], **inputs[1])
        except _Reached as reached:
            return self._checked(reached.value), pack_inputs(inputs, self._form_only)
        finally:
            # Or the activation would live until the next forward.
            self._received = None
        if not self.last:
            raise PipeOptimError(f"the model returned without running layer {self.end - 1}; a stage must run all its layers")
        return self._checked(output)

    def keep_forms_only(self, absent: list[WeightSlot]) -> None:
        """Keep only the form of the parameters and buffers in these slots."""
        for slot in absent:
            slot.clear()
        self._absent = absent

    def _resumed(self, *_: Any, **__: Any) -> Any:
        self._entered = True
        return self._received

    def _skipped(self, *_: Any, **__: Any) -> Any:
        return tree_map(lambda v: AbsentTensor.like(v) if isinstance(v, Tensor) else v, self._received)

    def _checked(self, output: Any) -> Any:
        if not self._entered:
            raise PipeOptimError(f"the model returned without running layer {self.start - 1}; a stage must run all its layers")
        if any(isinstance(leaf, AbsentTensor) for leaf in tree_leaves(output)):
            raise ConfigError(
                f"layers {self.start} .. {self.end - 1} need more of the stages before them than what layer {self.start - 1} "
                'returns; cut elsewhere with pins, or partition with how="trace"'
            )
        return output

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LayerStage:
        """Absent tensors, too, follow the stage to its device and type."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for slot in self._absent:
            old = slot.tensor
            moved = fn(torch.empty(0, dtype=old.dtype, device=old.device))
            setattr(slot.module, slot.attribute, AbsentTensor.made(old.shape, moved.dtype, moved.device))
        return self


def _stop(_module: nn.Module, _args: Any, output: Any) -> None:
    raise _Reached(output)


def _remove_contents(layer: nn.Module, forward: Callable[..., Any]) -> None:
    """Remove everything that computes; plain attributes, which the model may read in its loop, stay."""
    layer._modules.clear()
    layer._parameters.clear()
    layer._buffers.clear()
    for hooks in (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks):
        hooks.clear()
    layer.__dict__["forward"] = forward
