"""What a fused step knows about its tensors, kept from step to step and checked cheaply before each.

For a hundred small tensors, asking each for its type, layout and address would take longer than stepping them. So it is asked once, and
from then on only what may have changed is compared, in C loops (``map`` over lists of tensors): every Python object of our own would be
another cache miss. Saved, together with one kernel call per batch: 605 -> 176 us per step of AdamW over 100 small tensors.
``pipeoptim bench predict`` shows the whole step.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter, getitem, is_
from typing import Any, cast

import torch
from torch import Tensor

from pipeoptim.kernels import calls
from pipeoptim.kernels.library import available
from pipeoptim.kernels.tensor_layout import share_flat_index
from pipeoptim.rules.entries import ParameterEntry
from pipeoptim.rules.fused.batch import StepperBatch, stepper_of
from pipeoptim.rules.fused.steppers import Stepper

_PLAIN = {Tensor, torch.nn.Parameter}

_dtype, _layout, _is_cpu = attrgetter("dtype"), attrgetter("layout"), attrgetter("is_cpu")
_MemoryForm = int | tuple[torch.Size, tuple[int, ...]]


def _memory_form(tensor: Tensor) -> _MemoryForm:
    """How a tensor lies in memory. The shape of a contiguous one does not matter to a kernel."""
    return tensor.numel() if tensor.is_contiguous() else (tensor.shape, tensor.stride())


def _all_plain_float32(tensors: Sequence[Tensor]) -> bool:
    """Whether all are plain, dense tensors of float32 on a CPU."""
    # Tensor subclasses (DTensor, functorch's wrappers) need not have their values at data_ptr().
    if not set(map(type, tensors)) <= _PLAIN or set(map(_layout, tensors)) != {torch.strided}:
        return False
    return set(map(_dtype, tensors)) == {torch.float32} and all(map(_is_cpu, tensors))


def _addresses(tensors: Sequence[Tensor]) -> bytes:
    """As bytes: ten numbers are compared with one memory access, ten objects with ten."""
    return array("Q", [*map(Tensor.data_ptr, tensors)]).tobytes()


class WeightForms:
    """The weights that move, and how they lie in memory."""

    def __init__(self, weights: list[Tensor]) -> None:
        self.weights = weights
        self.forms = [*map(_memory_form, weights)]
        self.addresses = _addresses(weights)

    def unchanged(self, grads: Sequence[Tensor]) -> bool:
        """Whether the weights lie as before, and these new gradients as the weights do."""
        if _addresses(self.weights) != self.addresses:
            return False
        # A lazily negated gradient (is_neg) has its values in memory with the opposite sign.
        if not _all_plain_float32(grads) or set(map(_dtype, self.weights)) != {torch.float32} or any(map(Tensor.is_neg, grads)):
            return False
        if self.forms == [*map(_memory_form, self.weights)] == [*map(_memory_form, grads)]:
            return True
        # Rare: gradients whose strides differ from their weights'. A kernel can take them if both are contiguous.
        triples = zip(self.weights, grads, self.forms, strict=True)
        return all(_memory_form(weight) == form and share_flat_index((weight, grad)) for weight, grad, form in triples)


class StateSnapshot:
    """The optimizer's state of the parameters that move: which tensors it holds, and where they lie.

    Args:
        entries: all parameters of the optimizer.
        moving: those that move.
    """

    def __init__(self, entries: Sequence[ParameterEntry], moving: Sequence[ParameterEntry]) -> None:
        # The members of a combined optimizer, each once, in the order of the entries.
        self.optimizers = list({id(entry.optimizer): entry.optimizer for entry in entries}.values())
        self.states = self._present_states()
        self._holders: list[Mapping[str, Any]] = []  # of each tensor: the state that holds it ...
        self._names: list[str] = []  # ... under which name
        self.tensors: list[Tensor] = []
        for entry in moving:
            stepper, state = stepper_of(entry.rule), entry.state
            assert stepper is not None
            # The step count as well: the kernel adds to it by address.
            for name in (*stepper.state_names(entry.group), *(["step"] if "step" in state else [])):
                self._holders.append(state)
                self._names.append(name)
                self.tensors.append(state[name])
        self.addresses = _addresses(self.tensors)

    @property
    def holders(self) -> list[Mapping[str, Any]]:
        """The states that hold the tensors."""
        return self._holders

    def unchanged(self) -> bool:
        """Whether every state holds the same tensors at the same addresses."""
        states = self._present_states()
        # By identity, which is enough: load_state_dict() replaces these dictionaries.
        if len(states) != len(self.states) or not all(map(is_, states, self.states)):
            return False
        try:
            same = all(map(is_, map(getitem, self._holders, self._names), self.tensors))
        except KeyError:  # somebody emptied a state
            return False
        return same and _addresses(self.tensors) == self.addresses

    def _present_states(self) -> list[Any]:
        return [state for optimizer in self.optimizers for state in optimizer.state.values()]


@dataclass(frozen=True)
class FusedPlan:
    """The parameters that move, all of which their kernels can take.

    Attributes:
        entries, out: what the plan was made for. Buffers are compared by identity: their owner, the engine, does not move them.
        batches: the parameters that move, by stepper.
        without_grad: places of the parameters without a gradient, which do not move.
        weights, state: what else must not have changed.
        prefetch: to be called before any of this is read.
    """

    entries: Sequence[ParameterEntry]
    out: Sequence[Tensor]
    batches: list[StepperBatch]
    without_grad: list[int]
    weights: WeightForms
    state: StateSnapshot
    prefetch: calls.CachePrefetch

    def still_fits(
        self, entries: Sequence[ParameterEntry], grads: Sequence[Tensor | None], out: Sequence[Tensor] | None
    ) -> bool:
        """Whether nothing has changed, and these gradients lie in memory as the weights do."""
        # EntryTable returns the same list until a param group changes, so identity covers groups and kinds.
        if entries is not self.entries or [n for n, grad in enumerate(grads) if grad is None] != self.without_grad:
            return False
        if len(out or ()) != len(self.out) or not all(map(is_, out or (), self.out)):
            return False
        if not self.state.unchanged():
            return False
        # Options are plain numbers in the groups, which anybody may change between two steps (amsgrad, momentum, ...).
        for batch in self.batches:
            if not batch.options_unchanged():
                return False
        present = [grad for grad in grads if grad is not None] if self.without_grad else cast(list[Tensor], grads)
        return self.weights.unchanged(present)

    @cached_property
    def moving(self) -> frozenset[int]:
        """Places of the parameters that kernels take."""
        return frozenset(place for batch in self.batches for place in batch.places)

    def supports_next_step(self) -> bool:
        """Whether the kernels can take the next step."""
        return all(batch.supports_next_step() for batch in self.batches)


def make_plan(
    entries: Sequence[ParameterEntry],
    grads: Sequence[Tensor | None],
    out: Sequence[Tensor] | None,
    over_gradients: bool = False,
) -> FusedPlan | None:
    """A plan for the parameters that have a gradient; None if there are none, or if no kernel can take one of them."""
    moving: list[ParameterEntry] = []
    by_stepper: dict[Stepper, list[ParameterEntry]] = {}
    for entry, grad in zip(entries, grads, strict=True):
        if grad is None:
            continue
        stepper = stepper_of(entry.rule)
        if stepper is None or not _kernel_can(stepper, entry, grad, None if out is None else out[entry.number]):
            return None
        moving.append(entry)
        # One kernel call per stepper; two families share a plan where a combined optimizer steps both.
        by_stepper.setdefault(stepper, []).append(entry)
    if not moving or not available():
        return None
    weights = [entry.weight for entry in moving]
    state = StateSnapshot(entries, moving)
    present = [grad for grad in grads if grad is not None]
    return FusedPlan(
        entries=entries,
        # A copy: the caller's list may change, while `still_fits` compares the buffers themselves.
        out=list(out or ()),
        batches=[StepperBatch(stepper, theirs, out, over_gradients) for stepper, theirs in by_stepper.items()],
        without_grad=[n for n, grad in enumerate(grads) if grad is None],
        weights=WeightForms(weights),
        state=state,
        prefetch=calls.CachePrefetch([*weights, *state.tensors, *present, *(out or ()), *entries, *state.holders]),
    )


def _kernel_can(stepper: Stepper, entry: ParameterEntry, grad: Tensor, out: Tensor | None) -> bool:
    """Whether the kernel has every option of this parameter's group and can take all of its tensors."""
    if not stepper.supports(entry.group):
        return False
    state = entry.state
    tensors = [state.get(name) for name in stepper.state_names(entry.group)]
    if not all(isinstance(tensor, Tensor) for tensor in tensors):  # torch's first step makes them
        return False
    buffers = [] if out is None else [out]
    return _countable(state.get("step")) and share_flat_index([entry.weight, grad, *buffers, *cast(list[Tensor], tensors)])


def _countable(step: Any) -> bool:
    """Whether a step count, if there is one, is of the form that torch gives it."""
    if step is None:
        return True
    return isinstance(step, Tensor) and step.dtype is torch.float32 and step.is_cpu and step.numel() == 1
