"""An optimizer's own step, as arguments of a kernel that predicts in the same pass over memory.

Only for steps that a kernel can do in one pass: Adam and optimizers of its form (AdamW, RAdam), SGD, and those that divide the gradient by
a root (Adagrad, RMSprop). A stepper belongs to a rule (`Rule.stepper`). Whatever it does not support runs torch's own step, followed by a
separate prediction. What the one pass saves is stated in `rules.fused.step`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pipeoptim.kernels import calls
from pipeoptim.rules.move import Group, Move, Scalar, State, scalar, square_root


class Stepper(ABC):
    """The step of one optimizer family."""

    @abstractmethod
    def supports(self, group: Group) -> bool:
        """Whether the kernel has every option that is switched on in this param group."""

    @abstractmethod
    def state_names(self, group: Group) -> tuple[str, ...]:
        """The tensors of the state that the step reads and writes besides weight and gradient; torch's own step makes them."""

    def supports_step(self, group: Group, t: float) -> bool:
        """Whether the kernel can take step t (counted from 1) already."""
        return True

    @abstractmethod
    def coefficients(self, group: Group, t: float, prediction: calls.KernelPrediction | None) -> Any:
        """The numbers of step t (counted from 1), and those of the prediction after it, if there is one."""

    @abstractmethod
    def tensors(self, weight: Tensor, states: Sequence[Tensor], out: Tensor | None) -> Any:
        """Where one parameter lies; `states`: those of `state_names`."""

    @abstractmethod
    def prediction_factors(self, move: Move, grad: Tensor, state: State) -> tuple[tuple[float, float], ...]:
        """The terms of the rule's move, as `calls.KernelPrediction` has them."""


class AdamStepper(Stepper):
    """Adam and AdamW without amsgrad."""

    def supports(self, group: Group) -> bool:
        numbers = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
        return not (group.get("amsgrad", False) or group["capturable"] or group["differentiable"]) and _are_numbers(numbers)

    def state_names(self, group: Group) -> tuple[str, ...]:
        return "exp_avg", "exp_avg_sq"

    def coefficients(self, group: Group, t: float, prediction: calls.KernelPrediction | None) -> calls.AdamCoefficients:
        lr, decay = _number(group["lr"]), _number(group["weight_decay"])
        beta1, beta2 = (_number(beta) for beta in group["betas"])
        decoupled = bool(group.get("decoupled_weight_decay", False))
        return calls.AdamCoefficients(
            b1=beta1,
            b2=beta2,
            rate=lr / (1 - beta1**t),  # the bias correction of m; that of v is in `inverse`
            # A reciprocal: the kernel multiplies per element where torch divides.
            inverse=1.0 / _number(square_root(1 - beta2**t)),
            eps=_number(group["eps"]),
            sign=-1.0 if group["maximize"] else 1.0,
            coupled=0.0 if decoupled else decay,
            # Decoupled decay shrinks the weight before the step, coupled decay enters the gradient.
            decay=lr * decay if decoupled else 0.0,
            prediction=prediction,
        )

    def tensors(self, weight: Tensor, states: Sequence[Tensor], out: Tensor | None) -> calls.AdamTensors:
        first, second = states
        return calls.AdamTensors(weight, first, second, out)

    def prediction_factors(self, move: Move, grad: Tensor, state: State) -> tuple[tuple[float, float], ...]:
        # The kernel has m and v in registers and reads no other tensors, so the terms must be of these.
        assert all(t.value is state["exp_avg"] and t.root is state["exp_avg_sq"] for t in move.terms)
        return tuple((_number(t.scale), 1.0 / _number(t.root_divisor)) for t in move.terms)


class RootStepper(Stepper):
    """The gradient over a root of squares: ``v = b2 v + gain g^2``, ``w = w - rate g / (sqrt(v) + eps)``.

    Args:
        squares: name of v in the state.

    Without weight decay: the prediction would have to take it from the weights after the step.
    """

    def __init__(self, squares: str) -> None:
        self.squares = squares

    @abstractmethod
    def decay_gain_rate(self, group: Group, t: float) -> tuple[float, float, float]:
        """b2, gain and rate of step t."""

    def supports(self, group: Group) -> bool:
        plain = not (group["differentiable"] or group.get("capturable", False))
        # Decay is excluded here; see the class.
        return plain and _are_numbers((group["lr"], group["weight_decay"])) and _number(group["weight_decay"]) == 0

    def state_names(self, group: Group) -> tuple[str, ...]:
        return (self.squares,)

    def coefficients(self, group: Group, t: float, prediction: calls.KernelPrediction | None) -> calls.AdamCoefficients:
        b2, gain, rate = self.decay_gain_rate(group, t)
        sign = -1.0 if group["maximize"] else 1.0
        return calls.AdamCoefficients(
            b1=0.0, b2=b2, gain=gain, rate=rate, inverse=1.0, eps=_number(group["eps"]), sign=sign, prediction=prediction
        )

    def tensors(self, weight: Tensor, states: Sequence[Tensor], out: Tensor | None) -> calls.AdamTensors:
        return calls.AdamTensors(weight, None, states[0], out)

    def prediction_factors(self, move: Move, grad: Tensor, state: State) -> tuple[tuple[float, float], ...]:
        assert all(t.root is state[self.squares] for t in move.terms)
        return tuple((_number(t.scale), 1.0 / _number(t.root_divisor)) for t in move.terms)


class SgdStepper(Stepper):
    """SGD with every option."""

    def supports(self, group: Group) -> bool:
        numbers = (group["lr"], group["momentum"], group["dampening"], group["weight_decay"])
        return not group["differentiable"] and _are_numbers(numbers)

    def state_names(self, group: Group) -> tuple[str, ...]:
        # torch makes no buffer without momentum.
        return () if _number(group["momentum"]) == 0 else ("momentum_buffer",)

    def coefficients(self, group: Group, t: float, prediction: calls.KernelPrediction | None) -> calls.SgdCoefficients:
        mu = _number(group["momentum"])
        return calls.SgdCoefficients(
            lr=_number(group["lr"]),
            mu=mu,
            damp=1.0 - _number(group["dampening"]),
            # Factors of gradient and buffer in the step.
            along=(1.0, mu) if group["nesterov"] else (0.0, 1.0),
            sign=-1.0 if group["maximize"] else 1.0,
            coupled=_number(group["weight_decay"]),
            prediction=prediction,
        )

    def tensors(self, weight: Tensor, states: Sequence[Tensor], out: Tensor | None) -> calls.SgdTensors:
        return calls.SgdTensors(weight, states[0] if states else None, out)

    def prediction_factors(self, move: Move, grad: Tensor, state: State) -> tuple[tuple[float, float], ...]:
        assert all(t.root is None for t in move.terms)
        # The kernel forms one factor of g and one of the buffer, so terms of the same tensor are added up.
        from_g = [_number(t.scale) for t in move.terms if t.value is grad]
        from_b = [_number(t.scale) for t in move.terms if t.value is not grad]
        return ((sum(from_g), sum(from_b)),)


def _are_numbers(values: Sequence[Any]) -> bool:
    """Whether none lies on an accelerator, where reading it would wait."""
    return not any(isinstance(value, Tensor) and value.device.type != "cpu" for value in values)


def _number(value: Any) -> float:
    if type(value) is float:  # the usual case
        return value
    read: Scalar = scalar(value)
    assert not isinstance(read, Tensor)
    return read
