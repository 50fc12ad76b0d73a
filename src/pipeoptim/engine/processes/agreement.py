"""Settings that must be equal in all processes of a pipeline, compared before the first message."""

from __future__ import annotations

import json
from dataclasses import dataclass

from pipeoptim.engine.processes.crowded_cores import NO_CORES, CoreUse, warn_of_crowded_cores
from pipeoptim.engine.processes.rendezvous import Rendezvous
from pipeoptim.errors import ConfigError


@dataclass(frozen=True)
class SharedSettings:
    """``settings`` in words; ``cut``: blocks per stage where the stage comes from ``partition``, else empty; ``cores``: what the process
    takes of its machine, where each may differ."""

    settings: str
    cut: tuple[int, ...] = ()
    cores: CoreUse = NO_CORES

    def write(self) -> str:
        """As text that :meth:`read` takes."""
        # Plain text: nothing that another process sends is ever unpickled or evaluated.
        return json.dumps([self.settings, self.cut, self.cores])

    @classmethod
    def read(cls, text: str) -> SharedSettings:
        """From the text of :meth:`write`."""
        settings, cut, cores = json.loads(text)
        return cls(settings, tuple(cut), CoreUse(*cores))

    def compare(self, other: SharedSettings, own_name: str, other_name: str) -> None:
        """Raises ConfigError where the two cannot work together."""
        if other.settings != self.settings:
            raise ConfigError(
                f"{own_name} was set up with {self.settings}, {other_name} with {other.settings}; give all the same"
            )
        # A stage that partition() did not make has no cut to compare.
        if self.cut and other.cut and self.cut != other.cut:
            raise ConfigError(
                f"{own_name} cut the model into {_blocks(self.cut)}, {other_name} into {_blocks(other.cut)}: each measured it by itself; "
                "give partition() group=torch.distributed.group.WORLD in all processes, so that one measures for all, or pins="
            )


def check_agreement(rendezvous: Rendezvous, settings: SharedSettings) -> None:
    """Raises ConfigError, in all processes, where one has other settings or another cut of the model; warns of too many threads."""
    everyone = [SharedSettings.read(text) for text in rendezvous.exchange_settings(settings.write())]
    for j, theirs in enumerate(everyone):
        settings.compare(theirs, rendezvous.name.format(rendezvous.index), rendezvous.name.format(j))
    warn_of_crowded_cores([theirs.cores for theirs in everyone], rendezvous.index)


def _blocks(cut: tuple[int, ...]) -> str:
    return f"{' + '.join(map(str, cut))} blocks"
