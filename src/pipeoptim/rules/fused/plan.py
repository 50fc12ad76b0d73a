"""What a fused step has found out about its tensors, kept from step to step and looked over cheaply before each.

An optimizer of a hundred small tensors would spend more time on asking each of them for its type, layout and address than on
stepping them. So this is asked once. From then on only what can have changed is compared: which tensors there are, where they lie,
and of the weights and of the gradients, which are new each time, how.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, getitem, is_
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from pipeoptim.kernels import calls
from pipeoptim.kernels.library import available
from pipeoptim.kernels.tensor_layout import flat
from pipeoptim.rules.entries import ParameterEntry
from pipeoptim.rules.fused.steppers import Stepper
from pipeoptim.rules.registry import Rule

_PLAIN = {Tensor, torch.nn.Parameter}
_NOBODY: Mapping[str, Any] = {}


_dtype, _layout, _is_cpu = attrgetter("dtype"), attrgetter("layout"), attrgetter("is_cpu")
_Form = int | tuple[torch.Size, tuple[int, ...]]


def _form(tensor: Tensor) -> _Form:
    """How a tensor lies in memory: one that is contiguous is all the same to a kernel whatever its shape."""
    return tensor.numel() if tensor.is_contiguous() else (tensor.shape, tensor.stride())


def _ordinary(tensors: Sequence[Tensor]) -> bool:
    """Whether all are plain, dense tensors of float32 on a CPU."""
    if not set(map(type, tensors)) <= _PLAIN or set(map(_layout, tensors)) != {torch.strided}:
        return False
    return set(map(_dtype, tensors)) == {torch.float32} and all(map(_is_cpu, tensors))


def _addresses(*lists: list[Tensor]) -> bytes:
    """As bytes: to compare with ten numbers takes one look at memory, where each of ten objects is one."""
    found = [*chain.from_iterable(map(Tensor.data_ptr, tensors) for tensors in lists)]
    return array("Q", found).tobytes()


class Family:
    """The parameters that one stepper moves.

    Args:
        stepper: theirs.
        numbers: their places among all parameters.
        parts: they themselves.
        states: of each the tensors of its state that the stepper names.
        outs: of each the buffer, or None.
        over_gradients: predictions are written over the gradients.

    Attributes:
        counts, steps: see `calls`.
    """

    def __init__(
        self,
        stepper: Stepper,
        numbers: Sequence[int],
        parts: Sequence[ParameterEntry],
        states: Sequence[Sequence[Tensor]],
        outs: Sequence[Tensor | None],
        over_gradients: bool,
    ) -> None:
        self.stepper, self.numbers, self.parts = stepper, numbers, parts
        self.counted = [item.state.get("step") for item in parts]
        self.counts = calls.StepCounters(self.counted)
        places = [stepper.place(i.weight, s, o) for i, s, o in zip(parts, states, outs, strict=True)]
        self.steps = calls.MultiTensorStep(places, over_gradients)
        self._groups = [item.group_number for item in parts]
        first = {group: n for n, group in reversed(list(enumerate(self._groups)))}
        order = {group: n for n, group in enumerate(first)}
        self._which, self._firsts = [order[group] for group in self._groups], list(first.values())
        self.options = [(parts[n].group, stepper.state_names(parts[n].group)) for n in self._firsts]

    def recipes(self, counts: Sequence[float]) -> tuple[list[int], list[tuple[int, float]]]:
        """Which numbers each parameter steps by, and for each set of numbers a parameter that has it and its step t."""
        if len(set(counts)) == 1:
            return self._which, [(n, counts[n] or 1.0) for n in self._firsts]
        found: dict[tuple[int, float], int] = {}
        firsts = []
        which = []
        for n, key in enumerate(zip(self._groups, counts, strict=True)):
            if key not in found:
                found[key] = len(found)
                firsts.append((n, key[1] or 1.0))
            which.append(found[key])
        return which, firsts

    def ready(self) -> bool:
        """Whether the kernel can take the next step."""
        after = [0.0 if step is None else now + 1 for step, now in zip(self.counted, self.counts.add(0.0), strict=True)]
        return all(self.stepper.ready(self.parts[n].group, t) for n, t in self.recipes(after)[1])


@dataclass
class FusedPlan:
    """The parameters that move, found fit for their kernels, and where their tensors lie.

    Looked over in loops that run in C, over lists rather than objects of our own: every object is another wait for memory.

    Attributes:
        parts, out: what it was made for.
        families: those that move; `still`: places of those without a gradient, which do not.
        weights: those that move; `forms`: how they lie.
        owners, states: each optimizer and what it remembered of its parameters.
        kept, names, tensors: (state, name, tensor) of all that the kernels use, as three lists.
        addresses: where weights, and what their steps read and write, lie. Buffers are known by what they are: they are the
            caller's own.
        fetch: to be called before any of this is looked at.
    """

    parts: Sequence[ParameterEntry]
    out: Sequence[Tensor | None]
    families: list[Family]
    still: list[int]
    weights: list[Tensor]
    forms: list[_Form]
    owners: list[Optimizer]
    states: list[Any]
    kept: list[Mapping[str, Any]]
    names: list[str]
    tensors: list[Tensor]
    addresses: bytes
    fetch: calls.CachePrefetch

    def holds(self, parts: Sequence[ParameterEntry], grads: Sequence[Tensor | None], out: Sequence[Tensor] | None) -> bool:
        """Whether everything is as it was, and these gradients lie in memory as the weights do."""
        if parts is not self.parts or [n for n, grad in enumerate(grads) if grad is None] != self.still:
            return False
        if len(out or ()) != len(self.out) or not all(map(is_, out or (), self.out)):
            return False
        states = [state for owner in self.owners for state in owner.state.values()]
        if len(states) != len(self.states) or not all(map(is_, states, self.states)):
            return False
        try:
            if not all(map(is_, map(getitem, self.kept, self.names), self.tensors)):
                return False
        except KeyError:
            return False
        for family in self.families:
            for group, names in family.options:
                if not family.stepper.covers(group) or family.stepper.state_names(group) != names:
                    return False
        return _addresses(self.weights, self.tensors) == self.addresses and self._lie(grads)

    def _lie(self, grads: Sequence[Tensor | None]) -> bool:
        """As ``flat`` of each weight and gradient, where that was so before."""
        given = [grad for grad in grads if grad is not None] if self.still else cast(list[Tensor], grads)
        if not _ordinary(given) or set(map(_dtype, self.weights)) != {torch.float32} or any(map(Tensor.is_neg, given)):
            return False
        if self.forms == [*map(_form, self.weights)] == [*map(_form, given)]:
            return True
        shaped = zip(self.weights, given, self.forms, strict=True)
        return all(_form(weight) == form and flat((weight, grad)) for weight, grad, form in shaped)

    def ready(self) -> bool:
        """Whether the kernels can take the next step."""
        return all(family.ready() for family in self.families)


def make_plan(
    parts: Sequence[ParameterEntry], grads: Sequence[Tensor | None], out: Sequence[Tensor] | None, over_gradients: bool = False
) -> FusedPlan | None:
    """A plan for the parameters that have a gradient; None if there are none, or one that no kernel can take."""
    found: dict[Stepper, list[tuple[int, list[Tensor]]]] = {}
    kept: list[tuple[Mapping[str, Any], str, Tensor]] = []
    for n, (item, grad) in enumerate(zip(parts, grads, strict=True)):
        if grad is None:
            continue
        stepper, state = stepper_of(item.rule), item.state
        if stepper is None or not stepper.covers(item.group):
            return None
        names = stepper.state_names(item.group)
        states = [state.get(name) for name in names]
        tensors = [t for t in states if isinstance(t, Tensor)]
        buffers = [] if out is None else [out[n]]
        if len(tensors) < len(states) or not _countable(state.get("step")) or not flat([item.weight, grad, *buffers, *tensors]):
            return None
        kept += [(state, name, tensor) for name, tensor in zip(names, tensors, strict=True)]
        kept += [(state, "step", state["step"])] if "step" in state else []
        found.setdefault(stepper, []).append((n, tensors))
    return _planned(parts, grads, list(out or ()), found, kept, over_gradients) if found and available() else None


def _planned(
    parts: Sequence[ParameterEntry],
    grads: Sequence[Tensor | None],
    out: Sequence[Tensor],
    found: Mapping[Stepper, list[tuple[int, list[Tensor]]]],
    kept: list[tuple[Mapping[str, Any], str, Tensor]],
    over_gradients: bool,
) -> FusedPlan:
    families = []
    for stepper, theirs in found.items():
        numbers = [n for n, _ in theirs]
        outs = [out[n] if out else None for n in numbers]
        states_of = [states for _, states in theirs]
        families.append(Family(stepper, numbers, [parts[n] for n in numbers], states_of, outs, over_gradients))
    still = [n for n, grad in enumerate(grads) if grad is None]
    weights = [item.weight for item, grad in zip(parts, grads, strict=True) if grad is not None]
    owners = list({id(item.optimizer): item.optimizer for item in parts}.values())
    states, names, tensors = map(list, zip(*kept, strict=True) if kept else ((), (), ()))
    return FusedPlan(
        parts=parts,
        out=list(out),
        families=families,
        still=still,
        weights=weights,
        forms=[*map(_form, weights)],
        owners=owners,
        states=[state for owner in owners for state in owner.state.values()],
        kept=states,
        names=names,
        tensors=tensors,
        addresses=_addresses(weights, tensors),
        fetch=calls.CachePrefetch([*weights, *tensors, *(g for g in grads if g is not None), *parts, *states]),
    )


def _countable(step: Any) -> bool:
    """Whether a step count, if there is one, is of the form that torch gives it."""
    if step is None:
        return True
    return isinstance(step, Tensor) and step.dtype is torch.float32 and step.is_cpu and step.numel() == 1


def stepper_of(rule: Rule | None) -> Stepper | None:
    """Of the rule's own class only: a subclass may predict something that the kernel does not know."""
    return vars(type(rule)).get("stepper") if rule is not None else None
