"""What a rule returns: where a weight goes, as plain data that several interpreters can apply.

A rule avoids arithmetic on whole tensors. It names the tensors and the scalars of its
formula, and `pipeoptim.rules.interpreters` turns them into kernels. So one file describes one optimizer family,
and a faster interpreter serves every family at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

Scalar = float | Tensor
"""A number, or a 0-dim tensor on an accelerator whose value is not read back (reading it would stall the device)."""

State = Mapping[str, Any]
Group = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Term:
    """One summand of a step: ``scale * value / (sqrt(root) / root_divisor + eps)``, or ``scale * value`` without root."""

    scale: Scalar
    value: Tensor
    root: Tensor | None = None
    root_divisor: Scalar = 1.0
    eps: Scalar = 0.0


@dataclass(frozen=True, slots=True)
class Move:
    """Where one weight goes: ``W_hat = keep * W - sum(terms)``."""

    terms: tuple[Term, ...]
    keep: Scalar = 1.0

    def scaled(self, scale: float) -> Move:
        """The move to ``W + scale * (W_hat - W)``.

        Example:
            >>> Move((Term(0.5, torch.ones(1)),), keep=0.9).scaled(0.5)
            Move(terms=(Term(scale=0.25, value=tensor([1.]), root=None, root_divisor=1.0, eps=0.0),), keep=0.95)
        """
        if scale == 1.0:  # not only faster: 1 + (keep - 1) would round
            return self
        return Move(tuple(replace(term, scale=scale * term.scale) for term in self.terms), 1.0 + scale * (self.keep - 1.0))


class PartialGradient(NamedTuple):
    """The gradient of the mini-batch in progress, as far as its micro-batches have come.

    Attributes:
        value: sum over the micro-batches so far, each weighted as in the update (1/M); None where none of them had a gradient.
        seen: share of the mini-batch that they are, 0 .. 1.
        factor: what `value` is multiplied by to be in the units of the update's gradient; 1/S where the loss was scaled by S.
    """

    value: Tensor | None
    seen: float
    factor: Scalar = 1.0


@dataclass(frozen=True, slots=True)
class Momentum:
    """The running mean of past gradients that a state holds: ``scale * value + of_weight * W``, in the units of a gradient.

    `of_weight` takes out the weight decay that has entered the mean.
    """

    value: Tensor
    scale: Scalar = 1.0
    of_weight: Scalar = 0.0


@dataclass(frozen=True, slots=True)
class Ahead:
    """What the prediction of one weight is made from, besides the state of its optimizer.

    Attributes:
        kind: of the prediction.
        rates: the learning rate of each of the next ``s`` updates.
        scale: factor on the predicted displacement. Rules ignore it: `ask_rule` applies it to the move of any rule.
        in_progress: gradient of the mini-batch in progress; None where it is not known.
        first: which update the first rate belongs to, counted from the last one in the state: 1 is the next, 0 that last one itself.
    """

    kind: str
    rates: tuple[Scalar, ...]
    scale: float = 1.0
    in_progress: PartialGradient | None = None
    first: int = 1

    def from_state_after(self) -> Ahead:
        """The same updates, asked of a state that has had the first of them; refined."""
        return replace(self, kind="refined", first=0)

    @property
    def steps(self) -> int:
        """The version gap ``s``."""
        return len(self.rates)

    @property
    def lr_sum(self) -> Scalar:
        """Sum of the next ``s`` learning rates; exactly ``lr * s`` when the rate is constant."""
        return total(self.rates)

    def decaying_sum(self, factor: Scalar, *, first_power: int = 1) -> Scalar:
        """``sum_i lr_i * factor^(first_power + i - 1)``, i = 1..s: what is left of a momentum that is fed zeros."""
        return total([lr * factor ** (first_power + i) for i, lr in enumerate(self.rates)])


def as_real(tensor: Tensor) -> Tensor:
    """Complex tensors as pairs of reals, as torch's own optimizers treat them."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def scalar(value: Any) -> Scalar:
    """A hyperparameter as a float, or as a 0-dim tensor where reading it would wait for an accelerator."""
    if type(value) is float:  # the usual case
        return value
    if isinstance(value, Tensor):
        value = value.detach()
        # On a CPU reading is free, and a float takes the faster paths of the interpreters.
        return float(value.item()) if value.device.type == "cpu" else value.reshape(())
    return float(value)


def total(values: Sequence[Scalar]) -> Scalar:
    """Sum of scalars; correctly rounded when all are floats, so that s equal rates give exactly ``lr * s``."""
    floats = [v for v in values if not isinstance(v, Tensor)]
    if len(floats) == len(values):
        return math.fsum(floats)
    # One tensor s times, as without a schedule: one multiplication, rounded once, as for floats.
    if all(v is values[0] for v in values):
        return values[0] * len(values)
    result: Scalar = 0.0
    for value in values:
        result = result + value
    return result


def square_root(value: Scalar) -> Scalar:
    """Square root of a float or of a 0-dim tensor."""
    return value.sqrt() if isinstance(value, Tensor) else math.sqrt(value)


def steps_taken(state: State) -> Scalar | None:
    """``t`` of this parameter's state, at least 1; None when the optimizer never updated it."""
    step = state.get("step")
    if step is None:
        return None
    step = scalar(step)
    if isinstance(step, Tensor):
        return step.clamp(min=1)
    return step if step >= 1 else None


def gradient(weight: Tensor, grad: Tensor, group: Group, *, decay: bool) -> Tensor:
    """The gradient that enters the update: maximize sign, and ``weight_decay * W`` if `decay` (coupled decay)."""
    if group.get("maximize", False):
        # A new tensor: the caller's gradient is not ours to change.
        grad = -grad
    weight_decay = scalar(group.get("weight_decay", 0.0)) if decay else 0.0
    if isinstance(weight_decay, Tensor):
        return torch.addcmul(grad, weight, weight_decay)
    return grad.add(weight, alpha=weight_decay) if weight_decay != 0 else grad


def steps_after(state: State) -> Scalar:
    """``t`` after one more update."""
    return scalar(state["step"]) + 1


def mean_square_after(mean: Tensor, g: Tensor, decay: Scalar) -> Tensor:
    """``decay * mean + (1 - decay) * g^2``, a new tensor, with torch's roundings."""
    if isinstance(decay, Tensor):  # value= would read it from the device
        return (mean * decay).add_(g * g * (1 - decay))
    return (mean * decay).addcmul_(g, g, value=1 - decay)


def raw_momentum(mean: Tensor, scale: Scalar, group: Group, *, decay: bool) -> Momentum:
    """A mean of what entered the updates, as a mean of gradients: without the maximize sign and, if `decay`, coupled decay."""
    sign = -1.0 if group.get("maximize", False) else 1.0
    return Momentum(mean, sign * scale, -sign * scalar(group.get("weight_decay", 0.0)) if decay else 0.0)


def decoupled_keep(group: Group, ahead: Ahead, *, decay: bool) -> Scalar:
    """``1 - weight_decay * (sum of the next learning rates)``: decoupled decay, linear in s; 1 if not `decay`."""
    if not decay or ahead.kind == "paper":
        return 1.0
    weight_decay = scalar(group["weight_decay"])
    if not isinstance(weight_decay, Tensor) and weight_decay == 0:
        return 1.0
    return 1.0 - weight_decay * ahead.lr_sum
