"""Processes of one machine that together use more threads than it has cores: each step then waits for threads that wait for a core.

torch takes a thread per core in every process unless it is told otherwise. torchrun tells it (``OMP_NUM_THREADS=1``), others do not.
"""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch


class CoreUse(NamedTuple):
    """What a process takes of its machine's cores.

    Attributes:
        machine: which one; processes in containers of one machine share it.
        threads: that torch computes with; 0 where it computes elsewhere.
        cores: that this process may run on.
    """

    machine: str = ""
    threads: int = 0
    cores: Sequence[int] = ()


NO_CORES = CoreUse()
"""Of a process that does not compute on its machine's cores."""


def own_core_use(on_cpu: bool) -> CoreUse:
    """Of this process."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    machine = boot.read_text().strip() if boot.exists() else socket.gethostname()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return CoreUse(machine, torch.get_num_threads() if on_cpu else 0, sorted(cores))


def warn_of_crowded_cores(uses: Sequence[CoreUse], index: int) -> None:
    """A warning, in the first of the crowded processes of a machine.

    Args:
        uses: of all processes, in the same order everywhere.
        index: which of them this process is.
    """
    here = [n for n, use in enumerate(uses) if use.machine == uses[index].machine and use.threads]
    threads, cores = [uses[n].threads for n in here], {core for n in here for core in uses[n].cores}
    if here[:1] != [index] or max(threads) == 1 or sum(threads) <= len(cores):
        return
    fair = max(1, len(cores) // len(here))
    many = f"{len(cores)} core{'s' * (len(cores) > 1)}"
    warnings.warn(
        f"{len(here)} processes of the pipeline compute with {sum(threads)} threads on {many} and hold each other up; call "
        f"torch.set_num_threads({fair}) in each of them, or start them with OMP_NUM_THREADS={fair}",
        stacklevel=2,
    )
