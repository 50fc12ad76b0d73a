"""What every stage of this process did, and when: recorded while it trains, written to one file per stage.

A pipeline without a trace runs the plain classes and pays nothing. With one it runs those of :mod:`pipeoptim.engine.traced`,
which read the clock before and after each action. :mod:`pipeoptim.telemetry.trace` turns the files into pictures.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import torch

from pipeoptim.errors import ConfigError
from pipeoptim.files import as_path
from pipeoptim.schedule import Program

FORMAT = 1


class TraceClock(Protocol):
    """Marks moments cheaply, and says later when they were."""

    def now(self) -> Any:
        """A moment."""
        ...

    def nanoseconds(self, moment: Any) -> int:
        """When ``moment`` was, on the monotonic clock of this machine, which all its processes share."""
        ...


class HostTraceClock:
    """For devices that have computed when a call returns: CPUs."""

    now = staticmethod(time.perf_counter_ns)

    def nanoseconds(self, moment: int) -> int:
        return moment


class DeviceTraceClock:
    """For devices that compute asynchronously: moments are events in the queue of the device, which is not waited for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        torch.accelerator.synchronize(device)  # events tell only differences: here one and the host's clock are read together
        self._zero = self.now()
        torch.accelerator.synchronize(device)
        self._began = time.perf_counter_ns()

    def now(self) -> torch.Event:
        event = torch.Event(self.device, enable_timing=True)
        event.record(torch.accelerator.current_stream(self.device))
        return event

    def nanoseconds(self, moment: torch.Event) -> int:
        moment.synchronize()
        return self._began + round(1e6 * self._zero.elapsed_time(moment))


class TraceRow:
    """The record of one stage. ``add`` takes what ``now`` returned; both do nothing outside the mini-batches to record."""

    def __init__(self, k: int, program: Program, method: str, device: torch.device, first: int, end: int) -> None:
        self.k, self.program, self.method = k, program, method
        self.clock: TraceClock = HostTraceClock() if device.type == "cpu" else DeviceTraceClock(device)
        # In micro-batches: a stage knows which of them comes, not which mini-batch the user is at.
        self._first, self._end = first * program.microbatches, end * program.microbatches
        self._fed = -1
        self.on = False
        self.spans: list[tuple[str, int, Any, Any, int, int]] = []

    def begin_micro_batch(self) -> None:
        """The forward of the next micro-batch begins."""
        self._fed += 1
        self.on = self._first <= self._fed < self._end

    def now(self) -> Any:
        """The moment at which something begins; None where nothing is recorded."""
        return self.clock.now() if self.on else None

    def add(self, what: str, number: int, began: Any, peer: int = -1, nbytes: int = 0) -> None:
        """``what``, which began at ``began``, ends: its number, the other stage that it concerns, and the size of a message."""
        if self.on and began is not None:
            self.spans.append((what, number, began, self.clock.now(), peer, nbytes))

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data, times in nanoseconds."""
        # Only now are moments turned into times: on a device that waits for its events.
        when = self.clock.nanoseconds
        return {
            "format": FORMAT,
            "stage": self.k,
            "depth": self.program.depth,
            "microbatches": self.program.microbatches,
            "order": self.program.order,
            "method": self.method,
            "clock": _clock_name(),
            "process": os.getpid(),
            "device": self.program.process_of(self.k),
            "spans": [[what, number, when(a), when(b), peer, n] for what, number, a, b, peer, n in self.spans],
        }


class Trace:
    """Records F, B, U, predictions, waiting and messages of the stages in this process.

    Give it to :class:`~pipeoptim.Schedule` or :class:`~pipeoptim.Emulator` as ``trace``; after training, :meth:`save` it in
    every process, and :func:`pipeoptim.merge_trace` makes one Chrome/Perfetto trace of all stages.

    Args:
        steps: mini-batches to record, so that neither memory nor file grows with the run.
        skip: mini-batches before that.

    Raises:
        ConfigError: steps below 1, or skip below 0.

    Example:
        >>> import tempfile, torch, pipeoptim as po
        >>> trace = Trace(steps=2)
        >>> stages = [torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)]
        >>> pipe = po.Emulator(stages, lambda p: torch.optim.SGD(p, lr=0.1), torch.nn.functional.mse_loss, trace=trace)
        >>> for _ in range(3):
        ...     with trace.span("data"):
        ...         x, y = torch.ones(2, 4), torch.ones(2, 1)
        ...     loss = pipe.step(x, target=y)
        >>> pipe.drain()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     [path.name for path in trace.save(folder)]
        ['stage-0.json', 'stage-1.json']
    """

    def __init__(self, steps: int = 200, skip: int = 0) -> None:
        for what, value, least in (("steps", steps, 1), ("skip", skip, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{what} of a trace is {value!r}, must be an integer of at least {least}")
        self.steps, self.skip = steps, skip
        self._rows: dict[int, TraceRow] = {}

    def row(self, k: int, program: Program, method: str, device: torch.device) -> TraceRow:
        """The record of stage ``k``; called by the engines.

        Raises:
            ConfigError: it has one already.
        """
        if k in self._rows:
            raise ConfigError(f"the trace already records a stage {k}; make a Trace of its own for each pipeline")
        self._rows[k] = TraceRow(k, program, method, device, self.skip, self.skip + self.steps)
        return self._rows[k]

    @contextmanager
    def span(self, name: str, k: int | None = None) -> Iterator[None]:
        """Record the ``with`` block as ``name`` on the row of stage ``k``, by default the first one of this process."""
        row = self._rows.get(min(self._rows, default=0) if k is None else k)
        began = row.now() if row is not None else None
        yield
        if row is not None:
            row.add(name, -1, began)

    def save(self, folder: Path | str) -> list[Path]:
        """Write ``folder/stage-<k>.json`` for every stage of this process; the folder is made, older files are replaced.

        Raises:
            ConfigError: it cannot be written.
        """
        folder, paths = as_path("folder", folder), []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for k, row in sorted(self._rows.items()):
                path, part = folder / f"stage-{k}.json", folder / f"stage-{k}.json.part"
                # replaced as a whole: a reader never sees half a file
                part.write_text(json.dumps(row.to_json(), separators=(",", ":")), encoding="utf-8")
                part.replace(path)
                paths.append(path)
        except OSError as error:
            raise ConfigError(f"the trace cannot be written to {folder} ({error.strerror}); choose another folder") from error
        return paths


def _clock_name() -> str:
    """The same in processes that share a monotonic clock: those of one machine since it was started."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return platform.node()
