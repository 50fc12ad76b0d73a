"""What a partition is: stages, what they cost, and where every parameter of the model has gone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from pipeoptim.partitioning.places import Tied, full_state_dict
from pipeoptim.partitioning.profile import BlockCost


@dataclass(frozen=True)
class Partition:
    """A model cut into stages.

    Attributes:
        stages: modules that run one after the other.
        lengths: blocks per stage.
        costs: of the blocks, which the cut was chosen by.
        seconds: F and B of each stage for a mini-batch, on its own device.
        memory_bytes: weights, their copies, gradients and activations of each stage while ``method`` trains.
        names: per stage, name in the model's ``state_dict`` -> name in the stage's; with those of tied weights on every stage
            that has a copy.
        tied: parameters of the model that several stages use. Each stage has a copy of its own, equal at first: their
            gradients must be added up, or the weights untied.
        how: ``"blocks"``, ``"layers"`` or ``"trace"``.
    """

    stages: list[nn.Module]
    lengths: list[int]
    costs: list[BlockCost]
    seconds: list[float]
    memory_bytes: list[int]
    names: list[dict[str, str]] = field(default_factory=list)
    tied: list[Tied] = field(default_factory=list)
    how: str = "blocks"

    def full_state_dict(self, states: Sequence[Mapping[str, Tensor]] | None = None) -> dict[str, Tensor]:
        """The ``state_dict`` of the whole model, which its own class loads.

        Args:
            states: the ``state_dict`` of each stage, for instance gathered from other processes; by default those of
                :attr:`stages`.

        Example:
            >>> from pipeoptim.partitioning import partition
            >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
            >>> sorted(partition(model, 2, pins=[1]).full_state_dict())
            ['0.bias', '0.weight', '1.bias', '1.weight']
        """
        return full_state_dict(self.names, [s.state_dict() for s in self.stages] if states is None else states)

    def to_text(self) -> str:
        """The cut as a picture for the terminal: a bar per stage, as long as the stage takes."""
        longest, start, lines = max(self.seconds) or 1.0, 0, []
        for k, (length, seconds, memory) in enumerate(zip(self.lengths, self.seconds, self.memory_bytes, strict=True)):
            names = (
                f"{self.costs[start].name} .. {self.costs[start + length - 1].name}" if length > 1 else self.costs[start].name
            )
            bar = "#" * max(1, round(40 * seconds / longest))
            lines.append(f"stage {k}  {bar:40s} {seconds * 1e3:8.2f} ms {memory / 2**20:8.1f} MiB  {length:3d} blocks: {names}")
            start += length
        for tie in self.tied:
            where = ", ".join(f"{k}" for k, _ in tie.places)
            lines.append(f"tied: {' = '.join(tie.names)}, on stages {where}")
        return "\n".join(lines)
