"""A default process group whose processes know their ranks and meet in a store, and send each other nothing through it.

Where processes are replaced no real group can be used: gloo's connections are made once, by all processes together, and a fork has none
of the threads that serve them. What replaces it are :mod:`~pipeoptim.engine.transport.kept_link` and the store itself.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

_NAME = "pipeoptim_names"


def init_named_group(store: Store, rank: int, world_size: int) -> None:
    """As ``init_process_group``."""
    from torch._C._distributed_c10d import FakeProcessGroup

    def made(_store: Any, rank: int, size: int, _timeout: Any) -> Any:
        return FakeProcessGroup._create_internal(rank, size)

    dist.Backend.register_backend(_NAME, made, devices=["cpu"])
    dist.init_process_group(_NAME, store=store, rank=rank, world_size=world_size)
