"""Predictors that belong to a method instead of the user's optimizer: they keep averages of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipeoptim.methods.predictor_context import PredictorContext
from pipeoptim.rules.checks import check_dense
from pipeoptim.schedule import Program


class AveragePredictor:
    """Base: exponential averages per parameter, updated at each optimizer step, and a direction made of them.

    ``W_hat = W - steps * lr * direction``, lr that of the parameter's group at the time of the prediction. Frozen parameters, which may be
    whole numbers, are left to :class:`~pipeoptim.weights.StageWeights`, which predicts that they stay.
    """

    needs_previous: bool = False
    names: tuple[str, ...] = ()

    def __init__(self, context: PredictorContext) -> None:
        self.optimizer = context.optimizer
        params = self._params()
        self.state = {name: [torch.zeros_like(p, memory_format=torch.preserve_format) for p in params] for name in self.names}

    def _params(self) -> list[Tensor]:
        return [p.detach() for group in self.optimizer.param_groups for p in group["params"]]

    def _gradients(self) -> list[Tensor | None]:
        return [p.grad for group in self.optimizer.param_groups for p in group["params"]]

    def before_step(self, spare: Sequence[Tensor] | None) -> None:
        """Does nothing: the averages are updated from the gradients, which are still there after the step."""

    def after_step(self) -> None:
        """Update the averages with the gradient of the update just made."""
        with torch.no_grad():
            # A parameter without a gradient keeps its averages, as in torch's optimizers.
            for n, g in enumerate(self._gradients()):
                if g is not None:
                    self.absorb({name: self.state[name][n] for name in self.names}, g)

    def predict_into(self, out: Sequence[Tensor], steps: int) -> None:
        """Write ``W - steps * lr * direction`` into ``out``."""
        n = 0
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if p.requires_grad:
                    direction = self.direction({name: self.state[name][n] for name in self.names})
                    # The rate is read now, not at the step: a scheduler has advanced it for the coming update.
                    torch.sub(p.detach(), direction * (group["lr"] * steps), out=out[n])
                n += 1

    def use_program(self, program: Program, stage: int) -> None:
        """Go over to ``program``: nothing here depends on it."""

    def absorb(self, state: dict[str, Tensor], gradient: Tensor) -> None:
        """Update the averages of one parameter."""
        raise NotImplementedError

    def direction(self, state: dict[str, Tensor]) -> Tensor:
        """The direction of one parameter."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """The averages, as tensors."""
        return {name: [t.clone() for t in tensors] for name, tensors in self.state.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over :meth:`state_dict`."""
        for name, tensors in self.state.items():
            for own, saved in zip(tensors, state[name], strict=True):
                # Into the tensors that there are: on their device and in their memory format.
                own.copy_(saved)


class SmoothedGradient(AveragePredictor):
    """SpecTrain: ``v = g v + (1 - g) grad``, direction v (arXiv 1809.02839; g = 0.9)."""

    names = ("v",)
    gamma = 0.9

    def absorb(self, state: dict[str, Tensor], gradient: Tensor) -> None:
        state["v"].mul_(self.gamma).add_(gradient, alpha=1 - self.gamma)

    def direction(self, state: dict[str, Tensor]) -> Tensor:
        return state["v"]


class SmoothedAdam(AveragePredictor):
    """XPipe: Adam's form with constant bias divisors, ``(v / (1-g)) / (sqrt(m / (1-l)) + eps)`` (arXiv 1911.04610).

    Real and imaginary parts of complex weights move each on their own, as in torch's Adam.
    """

    names = ("v", "m")
    gamma, lam, eps = 0.9, 0.999, 1e-8

    def absorb(self, state: dict[str, Tensor], gradient: Tensor) -> None:
        check_dense(state["v"], gradient)  # a sparse gradient has no square
        v, m, g = _as_real(state["v"]), _as_real(state["m"]), _as_real(gradient)
        v.mul_(self.gamma).add_(g, alpha=1 - self.gamma)
        m.mul_(self.lam).addcmul_(g, g, value=1 - self.lam)

    def direction(self, state: dict[str, Tensor]) -> Tensor:
        v, m = _as_real(state["v"]), _as_real(state["m"])
        found = (v / (1 - self.gamma)) / ((m / (1 - self.lam)).sqrt() + self.eps)
        return torch.view_as_complex(found) if state["v"].is_complex() else found


class WeightDrift(AveragePredictor):
    """PipeMare T2: ``delta = g delta + (1 - g) (W_new - W_old)``; looks back: ``W - steps * delta``.

    ``g = decay ** (1 / tau)``, tau the stage's delay, so that all stages forget at the same pace measured in delays.
    """

    names = ("delta",)
    needs_previous = True

    def __init__(self, context: PredictorContext, decay: float) -> None:
        super().__init__(context)
        self.decay = decay
        self.use_program(context.program, context.stage)
        self._before: Sequence[Tensor] | None = None

    def use_program(self, program: Program, stage: int) -> None:
        """Forget at the pace of the delay of ``stage`` in ``program``."""
        self.gamma = self.decay ** (1 / max(1, program.steady_gap(stage)))

    def before_step(self, spare: Sequence[Tensor] | None) -> None:
        assert spare is not None
        self._before = spare  # the engine's free buffer: W_old needs no memory of its own
        for copy, p in zip(spare, self._params(), strict=True):
            copy.copy_(p)

    def after_step(self) -> None:
        assert self._before is not None
        with torch.no_grad():
            for delta, now, before in zip(self.state["delta"], self._params(), self._before, strict=True):
                # The same formula for every optimizer: it sees what the step did, decay included.
                if _can_move(delta):
                    delta.mul_(self.gamma).add_(now - before, alpha=1 - self.gamma)

    def predict_into(self, out: Sequence[Tensor], steps: int) -> None:
        for buffer, p, delta in zip(out, self._params(), self.state["delta"], strict=True):
            if _can_move(delta):
                torch.sub(p, delta, alpha=steps, out=buffer)


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _can_move(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
