"""Times work: by the host's clock on a CPU, by the device's own events on a GPU.

On a GPU a call returns long before its work is done, and a device that waits for Python would be measured as slow. So it is kept busy
first, until everything has been queued, and its events then measure the work itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from pipeoptim.errors import ConfigError

CYCLES = 1 << 25
"""For how long a GPU is kept busy before each sample, at first: some 20 ms."""

MOST_CYCLES = 1 << 29


class WorkTimer:
    """Times work on the CPU.

    Attributes:
        device: where the work is done.
        on_gpu: whether that is a GPU.
        noise: floats to read before each sample: more than its caches hold.
        host: seconds of the last call until it returned.
        late: whether the device had to wait for the host in the last sample, which then is of the host.
    """

    device = torch.device("cpu")
    on_gpu = False
    noise = 1 << 25

    def __init__(self) -> None:
        self.host = 0.0
        self.late = False

    def seconds(self, work: Callable[[], Any]) -> float:
        """How long it takes."""
        start = time.perf_counter()
        work()
        self.host = time.perf_counter() - start
        return self.host


class GpuTimer(WorkTimer):
    """Times work on a GPU by its events.

    Args:
        device: the GPU.
    """

    on_gpu = True
    noise = 1 << 27

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self._cycles = CYCLES

    def seconds(self, work: Callable[[], Any]) -> float:
        """How long the device takes, without waiting for the host if the host can be ahead at all."""
        seconds, self.late = self._once(work)
        while self.late and self._cycles < MOST_CYCLES:
            self._cycles *= 4
            seconds, self.late = self._once(work)
        return seconds

    def _once(self, work: Callable[[], Any]) -> tuple[float, bool]:
        with torch.cuda.device(self.device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            torch.cuda._sleep(self._cycles)  # type: ignore[no-untyped-call]
            start.record()
            super().seconds(work)
            end.record()
            late = bool(start.query())  # type: ignore[no-untyped-call]  # the device came that far while the host was still queuing
            end.synchronize()
        return 1e-3 * start.elapsed_time(end), late


def timer_of(device: str) -> WorkTimer:
    """The timer for a device by its name.

    Raises:
        ConfigError: it is neither "cpu" nor a GPU that torch finds here.

    Example:
        >>> timer_of("cpu").seconds(lambda: sum(range(1000))) > 0
        True
    """
    try:
        wanted = torch.device(device)
    except RuntimeError:
        wanted = None
    if wanted is None or wanted.type not in ("cpu", "cuda"):
        raise ConfigError(f"device is {device!r}, must be cpu, cuda or cuda:N")
    if wanted.type == "cpu":
        return WorkTimer()
    if (wanted.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device is {device!r}, but torch {torch.__version__} finds {torch.cuda.device_count()} GPUs here: "
            "install a build of torch for your GPU, or name another device"
        )
    return GpuTimer(wanted)
