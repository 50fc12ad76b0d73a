"""The default process group of a script of one's own that torchrun may restart."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from pipeoptim.engine.processes.fresh_store import fresh_rendezvous
from pipeoptim.errors import ConfigError
from pipeoptim.options.checks import seconds


def init_process_group(backend: str | None = None, timeout: float = 1800.0, device_id: torch.device | None = None) -> None:
    """As ``torch.distributed.init_process_group()``, also in the second and each later attempt of ``torchrun --max-restarts``.

    torchrun keeps its store between attempts, and torch's own function then waits for the processes that have died.

    Args:
        backend: ``"gloo"``, ``"nccl"``, ...; by default torch's choice.
        timeout: seconds to wait for the other processes, here and in each operation of the group.
        device_id: of this process, which NCCL then uses at once.

    Raises:
        ConfigError: the processes were not started by torchrun, or with its variables; there is a default group already.
        StageFailure: a process did not come in time.

    Example:
        >>> import os, unittest.mock, torch.distributed as dist, pipeoptim as po
        >>> from pipeoptim.engine.processes.loopback import loopback_environment, loopback_store
        >>> store = loopback_store()
        >>> by_torchrun = {**loopback_environment(store), "RANK": "0", "WORLD_SIZE": "1"}
        >>> with unittest.mock.patch.dict(os.environ, by_torchrun):
        ...     po.init_process_group("gloo")
        >>> dist.get_world_size()
        1
        >>> dist.destroy_process_group()
    """
    if dist.is_initialized():
        raise ConfigError("there is a default process group already; call pipeoptim.init_process_group() in place of torch's")
    store, rank, world_size = fresh_rendezvous(seconds("timeout", timeout))
    own, limit = PrefixStore("default_pg", store), timedelta(seconds=timeout)
    dist.init_process_group(backend, store=own, rank=rank, world_size=world_size, timeout=limit, device_id=device_id)
