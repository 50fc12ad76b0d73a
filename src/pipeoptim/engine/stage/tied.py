"""Which weight several stages use, and under which names; what is done about it is in :mod:`.tied_weights`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tied:
    """One weight that several stages use; each of them has a copy of its own.

    Attributes:
        names: in the model.
        places: (stage, name of the parameter in that stage), the first one first.
    """

    names: tuple[str, ...]
    places: tuple[tuple[int, str], ...]

    @property
    def holders(self) -> tuple[int, ...]:
        """The stages."""
        return tuple(k for k, _ in self.places)

    def name_on(self, k: int) -> str:
        """Its name on stage ``k``."""
        return dict(self.places)[k]

    def __str__(self) -> str:
        return " = ".join(f"{name!r} of stage {k}" for k, name in self.places)
