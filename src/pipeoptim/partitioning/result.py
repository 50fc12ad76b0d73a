"""The result of a partition: stages, their costs, and the place of every parameter of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from pipeoptim.engine.stage.tied import Tied
from pipeoptim.errors import ConfigError, bytes_in_words
from pipeoptim.partitioning.block_costs import BlockCost
from pipeoptim.partitioning.parameter_places import full_state_dict
from pipeoptim.partitioning.stage_row import StageRow
from pipeoptim.partitioning.svg import to_svg


@dataclass(frozen=True)
class Partition:
    """A model cut into stages.

    Attributes:
        stages: modules that run one after the other.
        lengths: blocks per stage.
        costs: of the blocks, which the cut was chosen by.
        seconds: F and B of each stage for a mini-batch, on its own device.
        memory_bytes: weights, their copies, gradients and activations of each stage while ``method`` trains; of a tied weight each of
            its stages counts a copy, and the sums of gradients on their way.
        replicas: devices of each stage.
        names: per stage, name in the model's ``state_dict`` -> name in the stage's; with those of tied weights on every stage
            that has a copy.
        tied: parameters of the model that several stages use. Each stage has a copy of its own, and carries the names of the others,
            by which pipelines keep them equal.
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
    replicas: list[int] = field(default_factory=list)

    def full_state_dict(self, states: Sequence[Mapping[str, Tensor]] | None = None) -> dict[str, Tensor]:
        """The ``state_dict`` of the whole model, which its own class loads.

        As in every ``state_dict`` of torch, the tensors are the stages' own and move on when training does; copy those to keep
        (``copy.deepcopy``). :func:`pipeoptim.full_state_dict` of a pipeline drains it first and gathers from processes.

        Args:
            states: the ``state_dict`` of each stage, for instance gathered from other processes; by default those of
                :attr:`stages`.

        Raises:
            ConfigError: ``states`` are not the states of all stages, or one lacks an entry.

        Example:
            >>> from pipeoptim.partitioning import partition
            >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
            >>> sorted(partition(model, 2, pins=[1]).full_state_dict())
            ['0.bias', '0.weight', '1.bias', '1.weight']
        """
        if states is None:
            states = [stage.state_dict() for stage in self.stages]
        elif not isinstance(states, list | tuple) or not all(isinstance(state, Mapping) for state in states):
            raise ConfigError(f"states is {states!r}, must be a list with the state_dict() of each stage, in order")
        elif len(states) != len(self.stages):
            raise ConfigError(
                f"states has {len(states)} entries for {len(self.stages)} stages; give the state_dict() of each, in order"
            )
        return full_state_dict(self.names, states)

    def __str__(self) -> str:
        """:meth:`to_text`."""
        return self.to_text()

    def rows(self) -> list[StageRow]:
        """What pictures show of each stage."""
        rows, start = [], 0
        for k, length in enumerate(self.lengths):
            blocks = self.costs[start : start + length]
            start += length
            sent = blocks[-1].output_bytes if k < len(self.lengths) - 1 else 0
            replicas = self.replicas[k] if self.replicas else 1
            rows.append(StageRow(k, blocks, self.seconds[k], self.memory_bytes[k], sent, replicas))
        return rows

    def to_text(self) -> str:
        """The cut as a picture for the terminal: a bar per stage, as long as the stage takes, F as ``=`` and B as ``#``."""
        rows = self.rows()
        longest = max(self.seconds) or 1.0
        lines = []
        for row in rows:
            length = max(1, round(40 * row.seconds / longest))
            forward = round(length * row.forward_share)
            bar = "=" * forward + "#" * (length - forward)
            lines.append(f"stage {row.k}  {bar:40s} {row.words()}")
        lines += [f"tied: {' = '.join(tie.names)}, on stages {', '.join(str(k) for k, _ in tie.places)}" for tie in self.tied]
        return "\n".join(lines)

    def blocks_text(self) -> str:
        """What every block costs, a line each: seconds of F and B, bytes of its output, of what is kept for B, and of its weights."""
        head = ("block", "F ms", "B ms", "output", "kept for B", "weights")
        lines = [head] + [
            (
                c.name,
                f"{c.forward * 1e3:.2f}",
                f"{c.backward * 1e3:.2f}",
                *map(bytes_in_words, (c.output_bytes, c.saved_bytes, c.weight_bytes)),
            )
            for c in self.costs
        ]
        first = max(len(line[0]) for line in lines)
        return "\n".join(f"{name:{first}s}" + "".join(f"{cell:>12s}" for cell in cells) for name, *cells in lines)

    def to_svg(self) -> str:
        """The cut as a self-contained SVG: a bar per stage, its blocks side by side, and a bar for its memory."""
        return to_svg(self.rows())
