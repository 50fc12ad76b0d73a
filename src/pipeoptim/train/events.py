"""Passes the events of a session on to its callbacks; costs nothing where there are none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeoptim.errors import ConfigError
from pipeoptim.train.callbacks import Callback, RunView

if TYPE_CHECKING:
    from pipeoptim.train.result import RunResult


class RunEvents:
    """The events of a session in this process.

    Args:
        callbacks: in the order in which they are called.
    """

    def __init__(self, callbacks: Sequence[Callback] = ()) -> None:
        for one in callbacks:
            if not isinstance(one, Callback):
                raise ConfigError(f"callbacks holds {one!r}, must be a list of pipeoptim.train.callbacks.Callback")
        self._all = tuple(callbacks)
        self._stepping = tuple(one for one in callbacks if type(one).on_step is not Callback.on_step)
        self._updating = tuple(one for one in callbacks if type(one).on_update is not Callback.on_update)
        self._run: RunView | None = None

    @property
    def update_hook(self) -> Callable[[int, int], None] | None:
        """``on_update`` of a pipeline; None where nobody listens."""
        return self._update if self._updating else None

    def begin(self, run: RunView) -> None:
        """The session of ``run``."""
        self._run = run
        for one in self._all:
            one.on_start(run)

    def step(self, step: int, loss: float) -> None:
        """Mini-batch ``step`` is done."""
        for one in self._stepping:
            assert self._run is not None
            one.on_step(self._run, step, loss)

    def _update(self, k: int, version: int) -> None:
        for one in self._updating:
            assert self._run is not None
            one.on_update(self._run, k, version)

    def validation(self, step: int, figures: Mapping[str, float]) -> None:
        """A validation is done."""
        for one in self._all:
            assert self._run is not None
            one.on_eval(self._run, step, figures)

    def checkpoint(self, step: int, folder: Path) -> None:
        """A checkpoint is complete."""
        for one in self._all:
            assert self._run is not None
            one.on_checkpoint(self._run, step, folder)

    def end(self, result: RunResult) -> None:
        """The result is written."""
        for one in self._all:
            assert self._run is not None
            one.on_stop(self._run, result)
