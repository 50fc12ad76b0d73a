"""What a fused step has found out about its tensors, kept from step to step and looked over cheaply before each.

An optimizer of a hundred small tensors would spend more time on asking each of them for its type, layout and address than on
stepping them. So this is asked once. From then on only what can have changed is compared: which tensors there are, where they lie,
and of the weights and of the gradients, which are new each time, how.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pipeoptim.kernels import calls
from pipeoptim.kernels.library import available
from pipeoptim.kernels.memory import flat
from pipeoptim.rules.drive import Item
from pipeoptim.rules.registry import Rule
from pipeoptim.rules.steps import Stepper

_PLAIN = (Tensor, torch.nn.Parameter)
_NOBODY: Mapping[str, Any] = {}


class Family:
    """The parameters that one stepper moves.

    Args:
        stepper: theirs.
        numbers: their places among all parameters.
        parts: they themselves.
        states: of each the tensors of its state that the stepper names.
        outs: of each the buffer, or None.

    Attributes:
        counts, steps: see `calls`.
    """

    def __init__(
        self,
        stepper: Stepper,
        numbers: Sequence[int],
        parts: Sequence[Item],
        states: Sequence[Sequence[Tensor]],
        outs: Sequence[Tensor | None],
    ) -> None:
        self.stepper, self.numbers, self.parts = stepper, numbers, parts
        self.counted = [item.state.get("step") for item in parts]
        self.counts = calls.Counts(self.counted)
        places = [stepper.place(i.weight, s, o) for i, s, o in zip(parts, states, outs, strict=True)]
        self.steps = calls.Steps(places)
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
class Plan:
    """The parameters that move, found fit for their kernels, and where their tensors lie.

    Attributes:
        parts, out: what it was made for.
        families: those that move; `still`: places of those without a gradient, which do not.
        shapes: shape and strides of those that move.
        owners, states: each optimizer and what it remembered of its parameters.
        kept: (state, name, tensor) of all that the kernels use.
        tensors, addresses: weights and what their steps read and write, and where they lie. Buffers and counts are known by what they
            are: buffers are the caller's own, and no count moves without the rest of its state.
    """

    parts: Sequence[Item]
    out: Sequence[Tensor | None]
    families: list[Family]
    still: list[int]
    moving: list[Item]
    shapes: list[tuple[torch.Size, tuple[int, ...]]]
    owners: list[Optimizer]
    states: list[Any]
    kept: list[tuple[Mapping[str, Any], str, Tensor]]
    tensors: list[Tensor]
    addresses: list[int]

    def holds(self, parts: Sequence[Item], grads: Sequence[Tensor | None], out: Sequence[Tensor] | None) -> bool:
        """Whether everything is as it was, and these gradients lie in memory as the weights do."""
        if parts is not self.parts or [n for n, grad in enumerate(grads) if grad is None] != self.still:
            return False
        if len(out or ()) != len(self.out) or not all(map(is_, out or (), self.out)):
            return False
        states = [state for owner in self.owners for state in owner.state.values()]
        if len(states) != len(self.states) or not all(map(is_, states, self.states)):
            return False
        if any(state.get(name) is not tensor for state, name, tensor in self.kept):
            return False
        for family in self.families:
            for group, names in family.options:
                if not family.stepper.covers(group) or family.stepper.state_names(group) != names:
                    return False
        return list(map(Tensor.data_ptr, self.tensors)) == self.addresses and self._lie(grads)

    def _lie(self, grads: Sequence[Tensor | None]) -> bool:
        """As ``flat`` of each weight and gradient, where that was so before."""
        given = [grad for grad in grads if grad is not None]
        for item, grad, (shape, stride) in zip(self.moving, given, self.shapes, strict=True):
            weight = item.weight
            if weight.dtype is not torch.float32 or weight.shape != shape or weight.stride() != stride:
                return False
            plain = type(grad) in _PLAIN and grad.dtype is torch.float32 and grad.is_cpu and grad.layout is torch.strided
            if not plain or grad.shape != shape or grad.is_neg():
                return False
            if grad.stride() != stride and not flat((weight, grad)):
                return False
        return True

    def ready(self) -> bool:
        """Whether the kernels can take the next step."""
        return all(family.ready() for family in self.families)


def make_plan(parts: Sequence[Item], grads: Sequence[Tensor | None], out: Sequence[Tensor] | None) -> Plan | None:
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
    return _planned(parts, grads, list(out or ()), found, kept) if found and available() else None


def _planned(
    parts: Sequence[Item],
    grads: Sequence[Tensor | None],
    out: Sequence[Tensor],
    found: Mapping[Stepper, list[tuple[int, list[Tensor]]]],
    kept: list[tuple[Mapping[str, Any], str, Tensor]],
) -> Plan:
    families = []
    for stepper, theirs in found.items():
        numbers = [n for n, _ in theirs]
        outs = [out[n] if out else None for n in numbers]
        families.append(Family(stepper, numbers, [parts[n] for n in numbers], [states for _, states in theirs], outs))
    still = [n for n, grad in enumerate(grads) if grad is None]
    moving = [item for item, grad in zip(parts, grads, strict=True) if grad is not None]
    owners = list({id(item.optimizer): item.optimizer for item in parts}.values())
    tensors = [*(item.weight for item in moving), *(tensor for _, name, tensor in kept if name != "step")]
    return Plan(
        parts=parts,
        out=list(out),
        families=families,
        still=still,
        moving=moving,
        shapes=[(item.weight.shape, item.weight.stride()) for item in moving],
        owners=owners,
        states=[state for owner in owners for state in owner.state.values()],
        kept=kept,
        tensors=tensors,
        addresses=[tensor.data_ptr() for tensor in tensors],
    )


def _countable(step: Any) -> bool:
    """Whether a step count, if there is one, is of the form that torch gives it."""
    if step is None:
        return True
    return isinstance(step, Tensor) and step.dtype is torch.float32 and step.is_cpu and step.numel() == 1


def stepper_of(rule: Rule | None) -> Stepper | None:
    """Of the rule's own class only: a subclass may predict something that the kernel does not know."""
    return vars(type(rule)).get("stepper") if rule is not None else None
