"""One stage of a partition in figures, for text and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeoptim.errors import bytes_in_words
from pipeoptim.partitioning.block_costs import BlockCost


@dataclass(frozen=True)
class StageRow:
    """One stage in a picture.

    Attributes:
        k: the stage.
        blocks: their costs.
        seconds, memory_bytes: of the stage, on its devices.
        sent_bytes: to the next stage, per mini-batch.
        replicas: its devices.
    """

    k: int
    blocks: Sequence[BlockCost]
    seconds: float
    memory_bytes: int
    sent_bytes: int
    replicas: int

    @property
    def forward_share(self) -> float:
        """Of F in the time of F and B."""
        both = sum(c.seconds for c in self.blocks)
        return sum(c.forward for c in self.blocks) / both if both else 0.0

    def words(self) -> str:
        """Seconds, bytes and blocks."""
        count = len(self.blocks)
        names = self.blocks[0].name if count == 1 else f"{self.blocks[0].name} .. {self.blocks[-1].name}"
        what = "block: " if count == 1 else "blocks:"
        copies = f" on {self.replicas} devices" if self.replicas > 1 else ""
        sent = f", sends {bytes_in_words(self.sent_bytes)}" if self.sent_bytes else ""
        return f"{self.seconds * 1e3:8.2f} ms {bytes_in_words(self.memory_bytes):>10s}{copies}  {count:3d} {what} {names}{sent}"
