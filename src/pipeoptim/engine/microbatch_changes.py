"""A number of micro-batches that is asked for in the middle of a step, from within ``on_update``, until it can take effect."""

from __future__ import annotations

from pipeoptim.errors import ConfigError
from pipeoptim.options import UpdateHook
from pipeoptim.schedule import Program


class PlannedChanges:
    """Which M holds from which mini-batch on.

    Every stage calls ``on_update`` after its own update, the last stage several mini-batches before the first::

        fed       n      n+1     n+2                      version v of all stages: at mini-batch v + g, g the largest version gap
        stage 0   v-2    v-1     v      <- asks
        stage 2   v      v+1     v+2
                  ^ asks

    So a change that was asked for at version v takes effect before mini-batch v + g: the first that every stage begins with it.

    Attributes:
        planned: mini-batch, counted from the beginning of training -> M from there on.
    """

    def __init__(self) -> None:
        self.planned: dict[int, int] = {}
        self.version: int | None = None  # of the update whose hook is running

    def noted(self, on_update: UpdateHook | None) -> UpdateHook | None:
        """``on_update``, during which it is known which version it was called for."""
        if on_update is None:
            return None

        def hook(k: int, version: int) -> None:
            self.version = version
            try:
                on_update(k, version)
            finally:
                self.version = None

        return hook

    def plan(self, m: int, version: int, program: Program) -> None:
        """``m`` was asked for after the update that made ``version``.

        Raises:
            ConfigError: another number was asked for at the same version.
        """
        at = version + max(program.steady_gap(k) for k in range(program.depth))
        if self.planned.setdefault(at, m) != m:
            raise ConfigError(
                f"set_microbatches() was given {m} and {self.planned[at]} at version {version}; ask for one number, on all stages"
            )

    def due(self, fed: int) -> int | None:
        """M from mini-batch ``fed`` on, where it changes there."""
        found = [self.planned.pop(at) for at in sorted(self.planned) if at <= fed]
        return found[-1] if found else None
