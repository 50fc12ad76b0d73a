"""Gradient clipping in a pipeline: which norm decides, and what is known when.

Synchronous training clips by the norm of the gradient of the whole model. In a pipeline no stage has the whole gradient, and
in one that never flushes the stages update at different times, so there is a choice to make; :class:`Clip` names it.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from pipeoptim.engine.stage.clipped_stage import ClippedStage
from pipeoptim.errors import ConfigError
from pipeoptim.rules import ClipEstimate
from pipeoptim.schedule import Program

SCOPES = ("stage", "global", "global_delayed")


@dataclass(frozen=True)
class Clip:
    """Scale the gradients of an update by ``min(1, max_norm / (norm + 1e-6))``, 2-norm, as ``clip_grad_norm_`` does.

    Args:
        max_norm: above 0; ``float("inf")`` measures without clipping.
        scope: whose norm:

            - ``"stage"``: of the stage's own gradients. Costs no communication; each stage has a limit of its own.
            - ``"global"``: of all stages' gradients of the same mini-batch, as without a pipeline. U(n) of every stage waits
              until all stages have done B(n); one float64 per stage is exchanged. The wait is as short as can be, since U(n) is
              carried out just before the stage's next F or B.
            - ``"global_delayed"``: of all stages' gradients of mini-batch ``n - d``, ``d = ceil(D/M)``, or the stage's own
              norm of mini-batch n where that is larger (it is a lower bound of the global one, and all that is known in the
              first d updates). With slack, D is what stage 0 has in flight. Nobody waits: F of stage 0 that U(n) depends on comes
              after B(n - d) of stage 0, so every stage has contributed to the norm before it is used.

    Raises:
        ConfigError: another scope, or a norm that is not above 0.

    Why ``"global"`` cannot deadlock: let U(n) be the oldest update that waits. It needs B(n) of every stage. In the program of
    stage j, every F and B before and including B(n) needs, of other stages, F and B that stand before their own U(n) (an F
    of stage j that precedes B(n) precedes U(n-1) on stage j-1; B(n) of stage j+1 precedes its U(n)), and updates older than n,
    which by choice of n do not wait. So every B(n) is carried out.

    Why it needs ``M >= D-1`` where nothing flushes: the last stage's first F of mini-batch n+1 comes after its U(n), hence
    after B(n) of stage 0, before which stage 0 runs D-1 forwards of later micro-batches, or more with slack. With fewer micro-batches
    these belong to mini-batches that have not been fed when ``step(n+1)`` must return its loss.

    Example:
        >>> Clip(1.0, "global")
        Clip(max_norm=1.0, scope='global')
    """

    max_norm: float
    scope: str = "stage"

    def __post_init__(self) -> None:
        if not isinstance(self.scope, str) or self.scope not in SCOPES:
            raise ConfigError(f"scope of clipping is {self.scope!r}, must be one of {', '.join(SCOPES)}")
        known = isinstance(self.max_norm, float) or type(self.max_norm) is int
        if not known or not self.max_norm > 0 or sys.float_info.max < self.max_norm < math.inf:
            raise ConfigError(f"max_norm is {self.max_norm!r}, must be a number above 0, for example 1.0")

    @property
    def exchanges(self) -> bool:
        """Whether stages exchange their norms."""
        return self.scope != "stage"

    @property
    def waits(self) -> bool:
        """Whether an update waits for the other stages."""
        return self.scope == "global"

    def check_tied(self) -> None:
        """Only the exact global norm is the same number on all holders of a tied weight."""
        if not self.waits:
            raise ConfigError(
                f"clipping with scope {self.scope!r} scales each stage's gradients by a number of its own, so the copies of a tied weight "
                "would diverge; use scope 'global', or no clipping"
            )

    def clipper(self, stage: ClippedStage) -> Clipper:
        """What carries it out on ``stage``."""
        return Clipper(self, stage)

    def delay(self, program: Program) -> int:
        """By how many updates the global norm is older than the gradients that it scales; 0 where it is not."""
        return max(1, -(-_longest(program) // program.microbatches)) if self.scope == "global_delayed" else 0

    def check(self, program: Program) -> None:
        """Raises ConfigError where the norm is not available when the update needs it."""
        if self.exchanges and (program.interleaved or program.overlap):
            raise ConfigError(
                f"clipping with scope {self.scope!r} is worked out for one stage per process and updates right after their backward; "
                "use scope 'stage', or neither interleaving nor overlap"
            )
        if self.waits and not program.flushes and program.microbatches < (least := _longest(program) - 1):
            bound, has = "depth - 1", f"depth is {program.depth}"
            if program.slack:
                bound, has = "micro-batches in flight - 1", f"with slack {least + 1} are in flight on stage 0"
            raise ConfigError(
                f"clipping by the exact global norm needs microbatches >= {bound} in a pipeline that never flushes: "
                f"microbatches is {program.microbatches}, {has}; set microbatches to {least} or more, use scope 'global_delayed' or "
                "'stage', or a method that flushes"
            )


def _longest(program: Program) -> int:
    """Micro-batches in flight on stage 0; D without slack."""
    return program.depth if program.flushes or not program.slack else program.in_flight(0)


class Clipper:
    """Carries out a :class:`Clip` on one stage.

    Args:
        clip: what to do.
        stage: where; its exchange is None for scope "stage".

    Attributes:
        used: the norm that scaled the newest update; None before the first.
    """

    scaled_tensors = None
    """All tensors are scaled by one factor."""

    def __init__(self, clip: Clip, stage: ClippedStage) -> None:
        clip.check(stage.program)
        assert (stage.norms is not None) == clip.exchanges
        self.rule, self.params, self.norms = clip, list(stage.params), stage.norms
        self._limit = float(clip.max_norm)  # torch takes no integer beyond 64 bits
        # By identity: == of tensors compares their values.
        others = {id(p) for p in stage.elsewhere}
        self._counted = [p for p in self.params if id(p) not in others]
        self.delay, self._whole = clip.delay(stage.program), stage.whole
        self.used: Tensor | float | None = None
        # A stage without gradients still takes part in every exchange, with norm 0.
        self._zero = torch.zeros((), dtype=self.params[0].dtype if self.params else None)
        self._own_norm: Tensor = self._zero
        self._sent: deque[int] = deque()  # versions whose global norm was not received yet
        self._global_norms: dict[int, float] = {}  # version -> its global norm

    def use_program(self, program: Program) -> None:
        """Go over to ``program``, in which the global norm may be older or newer; only with nothing in flight."""
        if self._sent:
            self._receive_up_to(self._sent[-1])
        # Where the norm is older now, the first updates go by their own.
        self.delay = self.rule.delay(program)
        self._keep_norms(self._global_norms)

    def send_norm(self, version: int) -> None:
        """Measure the gradients of the update after ``version``, which are complete, and send their norm to the other stages."""
        grads = [p.grad for p in self._counted if p.grad is not None]
        self._own_norm = self._whole(get_total_norm(grads) if grads else self._zero)
        if self.norms is not None:
            # float() waits for a device, but only where norms are exchanged; scope "stage" stays asynchronous.
            self.norms.send(version, float(self._own_norm))
            self._sent.append(version)

    def can_clip(self, version: int) -> bool:
        """Whether :meth:`apply` would not wait for a stage that cannot act meanwhile (the emulator's stages take turns)."""
        return not self.rule.waits or self.norms is None or self.norms.can_receive(version)

    def norm(self, version: int) -> Tensor | float:
        """The norm that decides about the update after ``version``; for scope "global" the same on every stage."""
        self._receive_up_to(version - self.delay)
        if self.norms is None:
            return self._own_norm
        # NaN for the first updates, which have no global norm to be late: max() below must not see it.
        known = self._global_norms.pop(version - self.delay, math.nan)
        if self.rule.waits:
            return known
        own = float(self._own_norm)
        # Compared in float64; apply() rounds the larger one to the type of the gradients' norm.
        return max(own, known) if math.isfinite(known) else own

    def apply(self, norm: Tensor | float) -> None:
        """Scale the gradients."""
        self.used = norm
        if not isinstance(norm, Tensor):
            norm = torch.tensor(norm, dtype=self._own_norm.dtype)
        # All of params, not only those counted: a copy of a tied weight is scaled like its counterpart on the first holder.
        clip_to_norm(self.params, self._limit, norm)

    def estimate(self) -> ClipEstimate:
        """How the coming update will be clipped, as far as can be known before its gradient is there.

        By its own norm, which an estimate of the gradient has as well; where the norm of other stages decides, as the newest update was.
        """
        return ClipEstimate(last_factor=self._last_factor()) if self.rule.exchanges else ClipEstimate(self._limit)

    def _last_factor(self) -> Tensor | float:
        """The factor that has scaled the gradients of the newest update; 1 before the first."""
        if self.used is None:
            return 1.0
        if isinstance(self.used, Tensor) and self.used.device.type != "cpu":  # not read: that would wait for the device
            return (self._limit / (self.used + 1e-6)).clamp(max=1.0)
        factor = self._limit / (float(self.used) + 1e-6)
        return factor if factor < 1.0 else 1.0  # also where it is not a number

    def _receive_up_to(self, newest: int) -> None:
        """Receive the global norms up to that of version ``newest``."""
        while self._sent and self._sent[0] <= newest and self.norms is not None:
            version = self._sent.popleft()
            self._global_norms[version] = total(self.norms.receive(version))

    def abandon(self) -> None:
        """Forget the norms of updates that were not carried out."""
        self._sent.clear()
        self._global_norms.clear()
        if self.norms is not None:
            self.norms.abandon()

    def state_dict(self) -> dict[str, Any]:
        """Norms that coming updates and predictions use."""
        if self._sent:
            # Sent ones are all received first: after a resume, nobody sends them again.
            self._receive_up_to(self._sent[-1])
        used = None if self.used is None else float(self.used)
        return {"versions": list(self._global_norms), "norms": list(self._global_norms.values()), "used": used}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over :meth:`state_dict`; begin anew where it is that of another rule, or empty."""
        self._sent.clear()
        if "versions" not in state:
            state = {"versions": [], "norms": []}
        self._keep_norms(dict(zip(state["versions"], state["norms"], strict=True)))
        self.used = state.get("used")  # what the next predictions expect of the clipping; earlier versions did not write it

    def _keep_norms(self, norms: dict[int, float]) -> None:
        """Of those of the newest versions, what coming updates will ask for."""
        newest = max(norms, default=-1)
        self._global_norms = {version: norm for version, norm in norms.items() if version > newest - self.delay}


def clip_to_norm(params: Sequence[Tensor], limit: float, norm: Tensor) -> None:
    """Scale gradients of this ``norm`` to ``limit``, unless the factor is 1, which would read and write them for nothing."""
    if norm.device.type != "cpu" or not limit / (norm + 1e-6) >= 1:  # nor where it is not a number
        clip_grads_with_norm_(list(params), limit, norm)


def total(norms: Sequence[float]) -> float:
    """The norm of a vector from the norms of its parts: float64, in the order of the stages, so that all get the same bits.

    >>> total([3.0, 4.0])
    5.0
    """
    return math.sqrt(sum(norm * norm for norm in norms))


__all__ = ["SCOPES", "Clip", "Clipper", "clip_to_norm", "total"]
