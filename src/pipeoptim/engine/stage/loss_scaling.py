"""Loss scaling for float16 in a pipeline: the scale travels back with the gradients, reports of overflows travel forward.

The last stage multiplies the loss by its scale; a mini-batch keeps the scale that it got there, however much later its
gradients reach stage 0. Each stage divides by that scale, checks whether its own gradients are finite, and skips its own
optimizer step if not. An overflow is reported to the last stage with the activations, as the scale that was too large; the last stage
backs off unless its scale is smaller already, so that one overflow seen by many stages counts once::

    stage 0  <--gradients, scale--   ...  <--gradients, scale--   last stage: loss * scale
             --activations, overflow-->   ...  --activations, overflow-->     backs off or grows the scale
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler


class LossScale:
    """The loss scaling of one stage.

    Args:
        scaler: torch's own; says how the scale grows and backs off, and holds the scale: on the last stage the one in force, on
            the others that of the newest update.
        is_last: whether the loss is computed here.
        microbatches: M.

    Attributes:
        current: the scale of the mini-batch whose gradients are being summed.
        overflowed: the smallest scale known to be too large that has not been sent on yet; 0 for none.
        finite: whether the gradients of the newest update were.
    """

    def __init__(self, scaler: GradScaler, is_last: bool, microbatches: int) -> None:
        self.scaler, self.is_last, self.microbatches = scaler, is_last, microbatches
        self.current, self.overflowed, self.finite = 1.0, 0.0, True
        self._scales: dict[int, float] = {}  # mini-batch -> its scale, on the last stage

    def scale(self, i: int, loss: Tensor) -> Tensor:
        """The loss of micro-batch ``i``, times the scale of its mini-batch. Last stage only."""
        # setdefault: the scale may move between two forwards of one mini-batch, whose gradients must all have the same factor.
        scale = self._scales.setdefault(i // self.microbatches, self.scaler.get_scale())
        return loss * scale

    def begin_backward(self, i: int, received: float) -> None:
        """Before B of micro-batch ``i``: its gradients came with the scale ``received``; the last stage knows it by itself."""
        if not self.is_last:
            # The same for all micro-batches of a mini-batch, so that summed gradients have one scale.
            self.current = received
            return
        self.current = self._scales[i // self.microbatches]
        if (i + 1) % self.microbatches == 0:  # the mini-batch's last backward
            del self._scales[i // self.microbatches]

    def unscale(self, params: Sequence[Tensor]) -> None:
        """Divide the gradients by their scale, and check whether they are finite."""
        # One kernel per device and type, as torch's GradScaler does: the foreach kernel takes no mixed lists.
        places: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for p in params:
            if p.grad is not None:
                places.setdefault((p.grad.device, p.grad.dtype), []).append(p.grad)
        found = []
        for (device, _), grads in places.items():
            infinite = torch.zeros(1, device=device)
            inverse = torch.full((1,), 1.0 / self.current, device=device)
            torch._amp_foreach_non_finite_check_and_unscale_(grads, infinite, inverse)
            found.append(infinite)
        # The only wait for the device: whether to step must be known to the program.
        self.finite = not any(float(infinite) for infinite in found)
        if not self.finite:
            self.note_overflow(self.current)

    def note_overflow(self, overflowed: float) -> None:
        """A scale was too large, here or on an earlier stage; 0: none was."""
        if overflowed:
            # The smallest: backing off from it covers the larger ones.
            self.overflowed = min(overflowed, self.overflowed or overflowed)

    def overflow_to_send(self) -> float:
        """What goes to the next stage with the next activation."""
        # Sent once: each stage hands it on, so that the last stage hears of an overflow through every stage between.
        overflowed, self.overflowed = self.overflowed, 0.0
        return overflowed

    def update(self) -> None:
        """After an update: the last stage moves its scale as torch's scaler would, the others follow it."""
        if not self.is_last:
            self.scaler.load_state_dict({**self.scaler.state_dict(), "scale": self.current})
            return
        overflowed, state = self.overflow_to_send(), self.scaler.state_dict()
        # A smaller scale in force means that the last stage has backed off since then: one overflow counts once.
        if overflowed and state["scale"] >= overflowed:
            state["scale"] *= state["backoff_factor"]
            state["_growth_tracker"] = 0
        elif self.finite:
            state["_growth_tracker"] += 1
            if state["_growth_tracker"] == state["growth_interval"]:
                grown = torch.tensor(state["scale"] * state["growth_factor"])  # float32, as torch keeps it
                state["scale"] = float(grown) if torch.isfinite(grown) else state["scale"]
                state["_growth_tracker"] = 0
        self.scaler.load_state_dict(state)

    def abandon(self) -> None:
        """Forget the scales of mini-batches in flight, and what is known of overflows."""
        self._scales.clear()
        self.current, self.overflowed, self.finite = 1.0, 0.0, True

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"scaler": self.scaler.state_dict(), "overflowed": self.overflowed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.scaler.load_state_dict(state["scaler"])
        self.overflowed = state["overflowed"]
        self._scales.clear()
