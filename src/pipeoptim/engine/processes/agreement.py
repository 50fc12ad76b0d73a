"""What all processes of a pipeline must have been told alike, compared before the first message."""

from __future__ import annotations

import json
from dataclasses import dataclass

from pipeoptim.engine.processes.rendezvous import Rendezvous
from pipeoptim.errors import ConfigError


@dataclass(frozen=True)
class SharedSettings:
    """``settings`` in words; ``cut``: blocks of each stage, where this process's stage is one of ``partition``'s, else empty."""

    settings: str
    cut: tuple[int, ...] = ()

    def write(self) -> str:
        """As text, for :meth:`read`."""
        return json.dumps([self.settings, self.cut])

    @classmethod
    def read(cls, text: str) -> SharedSettings:
        """From :meth:`write`."""
        settings, cut = json.loads(text)
        return cls(settings, tuple(cut))

    def compare(self, other: SharedSettings, own_name: str, other_name: str) -> None:
        """Raises ConfigError where the two do not go together."""
        if other.settings != self.settings:
            raise ConfigError(
                f"{own_name} was set up with {self.settings}, {other_name} with {other.settings}; give all the same"
            )
        if self.cut and other.cut and self.cut != other.cut:
            raise ConfigError(
                f"{own_name} cut the model into {_blocks(self.cut)}, {other_name} into {_blocks(other.cut)}: each measured it by itself; "
                "give partition() group=torch.distributed.group.WORLD in all processes, so that one measures for all, or pins="
            )


def check_agreement(rendezvous: Rendezvous, terms: SharedSettings) -> None:
    """All processes must run the same method with the same settings on one model; find out before the first message."""
    for j, theirs in enumerate(rendezvous.exchange_settings(terms.write())):
        terms.compare(SharedSettings.read(theirs), rendezvous.name.format(rendezvous.index), rendezvous.name.format(j))


def _blocks(cut: tuple[int, ...]) -> str:
    return f"{' + '.join(map(str, cut))} blocks"
