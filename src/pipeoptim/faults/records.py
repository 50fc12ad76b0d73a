"""What was planned and what has happened, in files: the processes that a failure hits are gone afterwards."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeoptim.faults.sentences import Fault


@dataclass(frozen=True)
class Fired:
    """A failure has happened.

    Attributes:
        process: whom it hit.
        at: seconds since the epoch.
        begun: mini-batches that the process had begun.
    """

    process: int
    at: float
    begun: int


@dataclass(frozen=True)
class Recovered:
    """A mini-batch was begun that had not been begun before the failure.

    Attributes:
        at: seconds since the epoch.
        repeated: mini-batches that were trained again for it.
    """

    at: float
    repeated: int


class FaultRecords:
    """In ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @classmethod
    def beside(cls, run: Path) -> FaultRecords:
        """Those of the run in this folder, where its processes and the command that watches it find them."""
        return cls(run.absolute().parent / "faults")

    def plan(self, faults: Sequence[tuple[Fault, int, int]]) -> None:
        """Write down each failure with its stage and the mini-batch or step at which it happens."""
        self._folder.mkdir(parents=True)
        planned = [{**asdict(fault), "stage": stage, "number": step} for fault, stage, step in faults]
        (self._folder / "plan.json").write_text(json.dumps(planned, indent=1) + "\n")

    def planned(self) -> list[Fault]:
        """With stages and steps."""
        return [Fault(**one) for one in json.loads((self._folder / "plan.json").read_text())]

    def fire(self, index: int, begun: int) -> bool:
        """Note that failure ``index`` happens to this process, now; False where it has happened already, in an earlier life."""
        return self._write("fired", index, asdict(Fired(os.getpid(), time.time(), begun)))

    def note_begun(self, index: int, begun: int) -> None:
        """The process that failure ``index`` has hit has begun more mini-batches, which count as its own until it notices."""
        part = self._folder / f".begun-{index}"
        part.write_text(json.dumps({"begun": begun}))
        part.replace(self._folder / f"begun-{index}.json")

    def recover(self, index: int, repeated: int) -> None:
        """Note that it is over."""
        self._write("recovered", index, asdict(Recovered(time.time(), repeated)))

    def fired(self, index: int) -> Fired | None:
        """None before it."""
        found, later = self._read("fired", index), self._read("begun", index)
        return None if found is None else Fired(**{**found, **(later or {})})

    def recovered(self, index: int) -> Recovered | None:
        """None before it."""
        found = self._read("recovered", index)
        return None if found is None else Recovered(**found)

    def _write(self, what: str, index: int, data: dict[str, Any]) -> bool:
        part = self._folder / f".{what}-{index}-{os.getpid()}"
        part.write_text(json.dumps(data))
        try:
            os.link(part, self._folder / f"{what}-{index}.json")  # unlike a rename, it fails where there is one
        except FileExistsError:
            return False
        finally:
            part.unlink()
        return True

    def _read(self, what: str, index: int) -> dict[str, Any] | None:
        try:
            return json.loads((self._folder / f"{what}-{index}.json").read_text())  # type: ignore[no-any-return]
        except FileNotFoundError:
            return None
