"""What carries tensors between processes: which backend of ``torch.distributed``."""

from __future__ import annotations

import torch.distributed as dist


def backend_of(device: str = "cpu") -> str | None:
    """The name of the backend that carries tensors on devices of this type."""
    # "cpu:gloo,cuda:nccl" becomes a dict; a device without an entry is carried by the backend of the CPU.
    backends = dict(pair.split(":") for pair in dist.get_backend_config().split(","))
    return backends.get(device, backends.get("cpu"))


def uses_gloo(device: str = "cpu") -> bool:
    """Whether tensors on devices of this type go through gloo, and not through something that may be slower or farther on purpose.

    Gloo's point-to-point messages are in the host's memory, so it may have to carry those of any device that has no backend.
    """
    return backend_of(device) == dist.Backend.GLOO
