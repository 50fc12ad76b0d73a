"""AdaGC: every tensor's gradient is clipped by a running mean of its own norms, so that an outlier does not get through.

No stage needs anything of another for it, in any engine and at any depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeoptim.engine.stage.clip import clip_to_norm
from pipeoptim.engine.stage.clipped_stage import ClippedStage
from pipeoptim.errors import ConfigError
from pipeoptim.options.checks import is_finite_number
from pipeoptim.rules import ClipEstimate
from pipeoptim.rules.move import as_real
from pipeoptim.schedule import Program


@dataclass(frozen=True)
class AdaGC:
    """Clip each tensor's gradient ``g`` by the running mean ``gamma`` of its own clipped norms (arXiv 2502.11034).

    ::

        update t > warmup    h = min(1, lambda_rel * gamma / |g|)               gamma <- beta * gamma + (1 - beta) * |h g|
        update t <= warmup   h = min(1, lambda_abs / (|all of the stage| + 1e-6))     gamma <- min(gamma, |h g|)

    ``|.|`` is the 2-norm. Only updates that are carried out count and move ``gamma``.

    Args:
        lambda_rel: how many times its running mean a norm may be; above 0.
        lambda_abs: largest norm in the warm-up, and of a tensor that has no running mean yet; above 0.
        beta: how slowly the mean forgets, from 0 to below 1.
        warmup: updates of each stage in which its gradients are clipped by their common norm.

    Raises:
        ConfigError: a number out of its bounds.

    Differences to the paper: the norm of the warm-up is that of the stage, as ``Clip(lambda_abs)`` has it, and not of the model. A
    gradient that is missing or all zeros leaves the tensor's mean as it is: a mean of 0 would freeze the tensor for ever.

    Example:
        >>> AdaGC(warmup=20)
        AdaGC(lambda_rel=1.05, lambda_abs=1.0, beta=0.98, warmup=20)
    """

    lambda_rel: float = 1.05
    lambda_abs: float = 1.0
    beta: float = 0.98
    warmup: int = 100

    def __post_init__(self) -> None:
        for name in ("lambda_rel", "lambda_abs"):
            if not is_finite_number(value := getattr(self, name)) or not value > 0:
                raise ConfigError(
                    f"{name} of AdaGC is {value!r}, must be a number above 0, for example {getattr(type(self), name)}"
                )
        if not is_finite_number(self.beta) or not 0 <= self.beta < 1:
            raise ConfigError(f"beta of AdaGC is {self.beta!r}, must be a number from 0 to below 1, for example 0.98")
        if isinstance(self.warmup, bool) or not isinstance(self.warmup, int) or self.warmup < 0:
            raise ConfigError(
                f"warmup of AdaGC is {self.warmup!r}, must be a number of updates, for example 100, or 0 for none"
            )

    @property
    def exchanges(self) -> bool:
        """False: stages tell each other nothing."""
        return False

    @property
    def waits(self) -> bool:
        """False."""
        return False

    def check(self, program: Program) -> None:
        """It works with every program."""

    def check_tied(self) -> None:
        """All copies have the same gradients, and so the same norms; but in the warm-up, that of their stage decides."""
        if self.warmup:
            raise ConfigError(
                f"AdaGC clips by the norm of each stage in its {self.warmup} updates of warm-up, so the copies of a tied weight would "
                "diverge; use AdaGC(warmup=0), Clip with scope 'global', or no clipping"
            )

    def clipper(self, stage: ClippedStage) -> TensorClipper:
        """What carries it out on ``stage``."""
        return TensorClipper(self, stage)


class TensorClipper:
    """Carries out :class:`AdaGC` on one stage.

    Args:
        rule: what to do.
        stage: where.

    Attributes:
        used: the norm of all gradients of the newest update, before it was clipped; None before the first.
    """

    def __init__(self, rule: AdaGC, stage: ClippedStage) -> None:
        self.rule, self._params, self._whole = rule, list(stage.params), stage.whole
        self._rel, self._abs = float(rule.lambda_rel), float(rule.lambda_abs)  # torch takes no integer beyond 64 bits
        self.used: Tensor | float | None = None
        self._updates = 0
        # In float64 where some weights are: a common type, since all norms stand in one tensor, which few operations then treat.
        double = any(p.dtype in (torch.float64, torch.complex128) for p in self._params)
        device = self._params[0].device if self._params else torch.device("cpu")
        self._means = torch.zeros(len(self._params), dtype=torch.float64 if double else torch.float32, device=device)
        # By way of float64: infinite where the type of the means holds no such number.
        self._first_limit = torch.tensor(self._abs, dtype=torch.float64).to(self._means)
        self._norms = self._means  # of the gradients of the coming update; 0 where there is none
        self._scaled = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def scaled_tensors(self) -> int:
        """Tensors that were scaled, in all updates together."""
        return int(self._scaled)

    def use_program(self, program: Program) -> None:
        """Nothing depends on it."""

    def send_norm(self, version: int) -> None:
        """Measure the gradients, which are complete."""
        places = [n for n, p in enumerate(self._params) if p.grad is not None]
        norms = torch.zeros_like(self._means)
        if places:
            grads = [as_real(p.grad.detach()) for p in self._params if p.grad is not None]
            # Measured in their common type: the norm of a bfloat16 tensor would be rounded to its type.
            found = torch._foreach_norm(grads, 2, self._means.dtype)
            together = torch.stack([norm.to(norms.device) for norm in found])
            norms = together if len(places) == len(self._params) else norms.index_copy(0, _index(places, norms), together)
        self._norms = self._whole(norms)

    def can_clip(self, version: int) -> bool:
        """Nobody is waited for."""
        return True

    def norm(self, version: int) -> Tensor:
        """That of all gradients."""
        norm: Tensor = torch.linalg.vector_norm(self._norms)
        return norm

    def apply(self, norm: Tensor | float) -> None:
        """Scale the gradients, and take their norms into the running means."""
        assert isinstance(norm, Tensor)
        self.used, norms, means = norm, self._norms, self._means
        there, known = norms > 0, means > 0
        if self._updates < self.rule.warmup:
            factors = (self._abs / (norm + 1e-6)).clamp(max=1.0).expand_as(norms)
            clip_to_norm(self._params, self._abs, norm)
            clipped = norms * factors
            moved = torch.where(known, torch.minimum(means, clipped), clipped)
        else:
            factors = (self._limits() / norms).clamp(max=1.0)
            self._scale(factors)
            clipped = norms * factors
            moved = torch.where(known, self.rule.beta * means + (1.0 - self.rule.beta) * clipped, clipped)
        self._means = torch.where(there, moved, means)
        self._scaled = self._scaled + (there & (factors < 1)).sum()
        self._updates += 1

    def _scale(self, factors: Tensor) -> None:
        """Multiply each gradient by its factor; on a CPU, where that can be read without waiting, only those that it changes."""
        if factors.device.type == "cpu":
            for p, factor in zip(self._params, factors.tolist(), strict=True):
                if p.grad is not None and factor != 1:
                    p.grad.mul_(factor)
            return
        for p, one in zip(self._params, factors.unbind(), strict=True):
            if p.grad is not None:
                p.grad.mul_(one.to(p.grad.device))

    def _limits(self) -> Tensor:
        """The largest norm that each tensor may have after the warm-up."""
        return torch.where(self._means > 0, self._rel * self._means, self._first_limit)

    def estimate(self) -> ClipEstimate:
        """How the coming update will be clipped: as it will be, since all limits are known."""
        if self._updates < self.rule.warmup:
            return ClipEstimate(self._abs)
        return ClipEstimate(max_norms=self._limits())

    def abandon(self) -> None:
        """Forget the norms of an update that was not carried out."""
        self._norms = torch.zeros_like(self._means)

    def state_dict(self) -> dict[str, Any]:
        """The running means, and where in the warm-up they are."""
        used = None if self.used is None else float(self.used)
        return {"means": self._means.clone(), "updates": self._updates, "scaled": self.scaled_tensors, "used": used}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over :meth:`state_dict`; begin anew where it is that of another rule, or empty."""
        if "means" not in state:
            state = {"means": torch.zeros_like(self._means), "updates": 0, "scaled": 0, "used": None}
        self._means = state["means"].to(self._means, copy=True)
        self._updates, self.used = state["updates"], state["used"]
        self._scaled = torch.full_like(self._scaled, state["scaled"])


def _index(places: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(places, device=like.device)


__all__ = ["AdaGC", "TensorClipper"]
