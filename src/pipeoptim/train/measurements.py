"""Brings what each stage measures to the one process that writes it down, without making any stage wait.

Each process leaves its rows in the store of the process group; the last stage's process collects the steps that are complete.
A gather would stall the pipeline, since the last stage is several mini-batches behind the first.
"""

from __future__ import annotations

import json
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pipeoptim.engine.processes.rendezvous import Rendezvous

MeasurementRows = list[dict[str, Any]]


class StageMeasurements(Protocol):
    """The rows of some steps, on their way to the last stage's process."""

    def post(self, step: int, rows: MeasurementRows) -> None:
        """Leave the rows of this process's stages for ``step``; every process does, with increasing steps."""
        ...

    def collect(self, wait: bool) -> list[tuple[int, MeasurementRows]]:
        """On the last stage: the steps that are complete by now, in order; with ``wait`` all that it posted itself."""
        ...


class LocalMeasurements:
    """Those of a run in one process."""

    def __init__(self) -> None:
        self._posted: list[tuple[int, MeasurementRows]] = []

    def post(self, step: int, rows: MeasurementRows) -> None:
        self._posted.append((step, rows))

    def collect(self, wait: bool) -> list[tuple[int, MeasurementRows]]:
        found, self._posted = self._posted, []
        return found


class StoreMeasurements:
    """Between processes, through the store of the default process group.

    Args:
        k, depth: the stage of this process, of how many.
        kind: what is measured; each kind of rows has a channel of its own.
    """

    def __init__(self, k: int, depth: int, kind: str = "figures") -> None:
        from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

        self.k, self.depth = k, depth
        self._store = PrefixStore(f"pipeoptim/{kind}", _get_default_store())
        self._due: list[int] = []

    def post(self, step: int, rows: MeasurementRows) -> None:
        self._store.set(f"{step}/{self.k}", json.dumps(rows))
        self._due.append(step)

    def collect(self, wait: bool) -> list[tuple[int, MeasurementRows]]:
        found = []
        while self._due:
            keys = [f"{self._due[0]}/{k}" for k in range(self.depth)]
            if wait:
                self._wait_for(keys)
            # Steps are reported in order, so the first incomplete one ends the search.
            elif not self._store.check(keys):
                break
            rows = [row for key in keys for row in json.loads(self._store.get(key))]
            found.append((self._due.pop(0), rows))
            self._forget(keys)
        return found

    def _wait_for(self, keys: list[str]) -> None:
        self._store.wait(keys, timedelta(seconds=300))

    def _forget(self, keys: list[str]) -> None:
        for key in keys:
            self._store.delete_key(key)


class KeptMeasurements(StoreMeasurements):
    """Between processes that may be replaced: rows stay in the store, since who takes over collects them again."""

    def __init__(self, rendezvous: Rendezvous, depth: int, kind: str) -> None:
        super().__init__(rendezvous.index, depth, kind)
        self._rendezvous = rendezvous

    def _wait_for(self, keys: list[str]) -> None:
        # In turns, in which it looks after neighbours: one that is being replaced needs this process to get as far.
        self._rendezvous.wait_for(keys, "to report", self._store)

    def _forget(self, keys: list[str]) -> None:
        """They may be asked for again."""
