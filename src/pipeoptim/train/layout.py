"""Which process of a run holds which stages, of which replica."""

from __future__ import annotations

from dataclasses import dataclass

from pipeoptim.config import TrainConfig
from pipeoptim.errors import counted


@dataclass(frozen=True)
class Layout:
    """``replicas`` pipelines of ``stages`` stages, ``chunks`` of them on every process.

    Example:
        >>> layout = Layout(stages=4, chunks=2, replicas=2)
        >>> layout.processes, layout.place(3), layout.name(3)
        (4, (1, (1, 3)), 'stages 1 and 3 of replica 1')
        >>> Layout(stages=8, chunks=8).name(0)
        'all stages'
    """

    stages: int
    chunks: int = 1
    replicas: int = 1

    @property
    def width(self) -> int:
        """Processes of one pipeline."""
        return self.stages // self.chunks

    @property
    def processes(self) -> int:
        """Of all pipelines."""
        return self.width * self.replicas

    @property
    def reporter(self) -> int:
        """The process that has the figures: that of the last stage, in the first replica."""
        return self.width - 1

    def place(self, rank: int) -> tuple[int, tuple[int, ...]]:
        """The replica and the stages of process ``rank``."""
        replica, first = divmod(rank, self.width)
        return replica, tuple(range(first, self.stages, self.width))

    def name(self, rank: int) -> str:
        """The name of process ``rank`` in messages."""
        replica, stages = self.place(rank)
        plural = len(stages) > 1
        name = (
            "all stages" if plural and len(stages) == self.stages else f"stage{'s' * plural} {' and '.join(map(str, stages))}"
        )
        return f"{name} of replica {replica}" if self.replicas > 1 else name

    def describe(self) -> str:
        """The layout in words, for titles."""
        parts = [counted(self.stages, "stage")]
        parts += [f"{self.chunks} per process"] if self.chunks > 1 else []
        parts += [f"{self.replicas} replicas"] if self.replicas > 1 else []
        return ", ".join(parts)


def layout_of(config: TrainConfig) -> Layout:
    """The layout of a run."""
    return Layout(config.stages, config.chunks, config.replicas)


def processes_of(config: TrainConfig) -> Layout:
    """The layout of the processes that carry a run out: one, with all stages, for an emulated run."""
    return Layout(config.stages, config.stages) if config.engine == "emulator" else layout_of(config)
