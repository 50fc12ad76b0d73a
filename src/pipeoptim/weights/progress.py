"""How far the mini-batch of the coming update has come on a stage: what predictions that use its gradients are made from."""

from __future__ import annotations

import math


class UpdateProgress:
    """The micro-batches whose backward is done since the last update.

    ::

        U  F0  B0  F1  B1  F2  B2  F3  B3  U        M = 4
           0       1       2       3            micro-batches done at each F

    Args:
        microbatches: M, of an update.
        refresh: after how many further micro-batches a prediction is made anew.

    Attributes:
        updates: how many are over, skipped ones among them.

    Example:
        >>> progress = UpdateProgress(4, refresh=2)
        >>> progress.note_backward(None)
        >>> progress.microbatches_done, progress.share_done, list(progress.shareable)
        (1, 0.25, [1, 0])
    """

    __slots__ = ("_shares", "microbatches", "refresh", "updates")

    def __init__(self, microbatches: int, refresh: int) -> None:
        self.microbatches, self.refresh = microbatches, refresh
        self._shares: list[float | None] = []
        self.updates = 0

    def note_backward(self, share: float | None) -> None:
        """A micro-batch that counts for ``share`` of the mini-batch had its backward; None for 1/M."""
        self._shares.append(share)

    def begin(self) -> None:
        """Nothing of the next update is there yet."""
        self._shares.clear()
        self.updates += 1

    @property
    def microbatches_done(self) -> int:
        """How many of M."""
        return len(self._shares)

    @property
    def share_done(self) -> float:
        """Which part of the update's gradient has been added up; exactly 1 when all of it has."""
        if len(self._shares) == self.microbatches:  # a sum of shares may round to a little less
            return 1.0
        return math.fsum(1 / self.microbatches if share is None else share for share in self._shares)

    @property
    def shareable(self) -> range:
        """The values of ``microbatches_done`` at which a prediction may have been made that still serves, the newest first."""
        # In steady state a backward comes before each forward: after `refresh` forwards as many more gradients are there.
        return range(len(self._shares), max(-1, len(self._shares) - self.refresh), -1)
