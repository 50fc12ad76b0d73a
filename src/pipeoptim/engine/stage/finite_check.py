"""A loss or a gradient that is not finite, or a loss that is an outlier: found before a weight takes it; then training ends, or one update
is left out.

The last stage knows the loss before anybody has updated on it, so its verdict travels back with the gradients::

    stage 0  <--gradients, verdict--   ...   <--gradients, verdict--  last stage: is the loss finite?
      U left out                             U left out                 U left out

A gradient that becomes infinite or NaN in a stage's own backward, of a loss that was finite, is found by that stage alone, in its update;
stages behind it may have made theirs. It leaves out its own update only, and those before it, which work with what it has sent, find
for themselves what has become of theirs. Where clipping waits for the norm of all stages, all of them find the same.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from pipeoptim.engine.stage.loss_outliers import LossOutliers
from pipeoptim.errors import DivergedError

MOST_IN_A_ROW = 10
"""Updates left out one after the other; with the next one training ends, since nothing is learnt any more."""

_log = logging.getLogger("pipeoptim")


class FiniteCheck:
    """What is bad about the mini-batch in progress on stage ``k``, and what follows.

    The mini-batch in progress is that of the next update, so its number, counted from 0, is the stage's version.

    Args:
        on_bad: "stop", "skip" or "rollback".
        k: the stage.
        device: where it computes.
        names: of its weights, in the order in which :meth:`judge_gradients` is given them.
        tied: whether other stages have copies of some of them.
        outlier: how far above the recent losses one is bad as well; None for no bound. On the last stage.

    Attributes:
        found: what is bad, in words; empty for nothing.
        outliers: tells outliers among losses; None where nobody asked for it.
        skipped: the mini-batches whose update was left out.
        looks: whether gradients are looked at even where nobody has measured their norm.
        left_out: mini-batches that are bad, whatever their loss is.
    """

    def __init__(
        self, on_bad: str, k: int, device: torch.device, names: Sequence[str], tied: bool, outlier: float | None = None
    ) -> None:
        self.outliers = None if outlier is None else LossOutliers(outlier)
        self.skips, self.k, self.names, self.tied = on_bad == "skip", k, names, tied
        self.looks = on_bad != "stop"
        # Where training stops, gradients are looked at only where their norm is there anyway: another pass over them costs up to 2 % of a
        # step, and a number on a GPU has to be waited for. What is missed, the next loss tells.
        self._reads_norms = self.looks or device.type == "cpu"
        self.found = ""
        self.skipped: list[int] = []
        self.left_out: frozenset[int] = frozenset()
        self._losses: dict[int, tuple[Tensor, torch.cuda.Event | None]] = {}  # micro-batch -> its loss, on its way to the CPU

    def note_loss(self, i: int, loss: Tensor) -> None:
        """F of micro-batch ``i`` has given ``loss``. On the last stage."""
        if loss.device.type != "cuda":
            self._losses[i] = loss, None
            return
        # Copied right behind the forward and read once the backward is queued, so that the device has work while the host waits.
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copy = loss.to("cpu", non_blocking=True)
        arrived.record(torch.cuda.current_stream(loss.device))
        self._losses[i] = copy, arrived

    def judge_loss(self, i: int, n: int) -> None:
        """Look at the loss of micro-batch ``i``, of mini-batch ``n``; before its gradients are sent.

        Raises:
            DivergedError: it is not finite, or an outlier, and nothing is to be skipped.
        """
        loss, arrived = self._losses.pop(i, (None, None))
        if n in self.left_out:
            self.found = "it is to be left out"
        if loss is None or self.found:  # it counts for nothing, or its mini-batch does
            return
        if arrived is not None:
            arrived.synchronize()
        value = float(loss)
        bad = "" if math.isfinite(value) else f"the loss is {value}"
        if self.outliers is not None and not bad:
            bad = self.outliers.judge(value)
        if not bad:
            return
        self.found = bad
        if not self.skips:
            raise DivergedError(
                f"{self.found} at step {n + 1}, on stage {self.k}; no weight has taken that update. {_remedy(n)}", n
            )

    def note_verdict(self, bad: bool) -> None:
        """What came with the gradients of a micro-batch."""
        if bad:
            self.found = "the loss was bad"

    def judge_gradients(self, parameters: Sequence[Tensor], n: int, norm: Tensor | float | None) -> None:
        """Look at the complete gradients of mini-batch ``n`` that ``parameters`` have; before the step.

        ``norm``: theirs, where it is known; None to look for oneself, if they are to be skipped.

        Raises:
            DivergedError: one is not finite, and it is not to be skipped, or this stage cannot do so alone.
        """
        if self.found or not (self._reads_norms if norm is not None else self.looks):
            return
        known, grads = norm is not None, [p.grad for p in parameters]
        if math.isfinite(_total(grads) if norm is None else float(norm)):
            return
        sick = (name for name, g in zip(self.names, grads, strict=True) if g is not None and not g.isfinite().all())
        first = next(sick, "none, but their norm" if known else "")
        if not first:  # only the sum is too large for its type
            return
        self.found = f"the gradients of stage {self.k} are not finite"
        told = f"{self.found} at step {n + 1} (first: {first!r})"
        if not self.skips:
            raise DivergedError(f"{told}; none of its weights has taken them. {_remedy(n)}", n)
        if self.tied:
            raise DivergedError(
                f"{told}; other stages have copies of its tied weights, so that it cannot leave out the update alone. Look at mini-batch "
                f"{n} (counted from 0), or untie the weights"
            )

    def note_skipped(self, n: int) -> None:
        """The update of mini-batch ``n`` is left out.

        Raises:
            DivergedError: and so were too many before it.
        """
        if self.skipped[-MOST_IN_A_ROW:] == list(range(n - MOST_IN_A_ROW, n)):
            raise DivergedError(
                f"{self.found} at step {n + 1}, on stage {self.k}, and the updates of {MOST_IN_A_ROW} mini-batches in a row before it, "
                f"{n - MOST_IN_A_ROW} to {n - 1} (counted from 0), were left out already; look at these, or lower the learning rate"
            )
        _log.info("stage %d leaves out the update of mini-batch %d (counted from 0): %s", self.k, n, self.found)
        self.skipped.append(n)

    def end_mini_batch(self) -> None:
        """Its update was made, or left out."""
        if self.outliers is not None:
            self.outliers.end_mini_batch(not self.found)
        self.found = ""

    def abandon(self) -> None:
        """Forget the mini-batches in flight."""
        if self.outliers is not None:
            self.outliers.end_mini_batch(False)
        self.found = ""
        self._losses.clear()


def _total(grads: Sequence[Tensor | None]) -> float:
    """A number that is not finite where one of them is not, and seldom else."""
    there = [grad for grad in grads if grad is not None]
    if not all(grad.device.type == "cpu" and grad.is_floating_point() for grad in there):
        return float(get_total_norm(there))  # waits for a device once
    # Sums take one pass at the speed of memory: two thirds of the time of norms, and 1/50 of that of torch's largest elements.
    return sum([float(grad.sum()) for grad in there])


def _remedy(n: int) -> str:
    return (
        f"Look at mini-batch {n} (counted from 0), lower the learning rate, or choose another method; on_bad='skip' leaves such updates "
        "out"
    )


__all__ = ["MOST_IN_A_ROW", "FiniteCheck"]
