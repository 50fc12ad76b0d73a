"""A stage whose parameters are sharded over its replicas by ``fully_shard`` (FSDP2): versions of the weights are versions of shards.

``fully_shard`` gathers whole parameters just before a module's forward, frees them after it, and gathers them again, into the
same memory, for the backward. So what a forward or a backward sees is decided by what the shards hold while it runs: a predicted
or stashed version is exchanged with the latest one for that time. Nothing whole is ever kept, and nothing that autograd saved
need be replaced.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from pipeoptim.engine.stage.reduction import NoReplicas
from pipeoptim.errors import ConfigError


def sharding_mesh(module: nn.Module) -> DeviceMesh | None:
    """The mesh that ``fully_shard`` spread ``module`` over; None where its parameters are whole.

    Raises:
        ConfigError: some parameters are sharded and some are not, or not by ``fully_shard`` alone.
    """
    params = list(module.parameters())
    sharded = [p for p in params if isinstance(p, DTensor)]
    if not sharded:
        return None
    if len(sharded) < len(params):
        raise ConfigError(
            f"{len(sharded)} of the stage's {len(params)} parameters are sharded; call fully_shard on the stage's module as well, "
            "which takes those that its parts have left"
        )
    mesh = sharded[0].device_mesh
    fits = all(p.device_mesh == mesh and _by_fully_shard(p) for p in sharded)
    if not fits or not any(isinstance(m, FSDPModule) for m in module.modules()):
        raise ConfigError(
            "the stage's parameters are distributed tensors of another kind than fully_shard makes on one mesh; "
            "a stage may be sharded by fully_shard over its replicas, and by nothing else"
        )
    return mesh


def _by_fully_shard(p: DTensor) -> bool:
    *outer, inner = p.placements
    return isinstance(inner, Shard) and len(outer) <= 1 and all(isinstance(place, Replicate) for place in outer)


class ShardedReduction(NoReplicas):
    """``fully_shard`` averages the gradients in every backward; this puts the right version of the shards in place.

    Args:
        module: the stage's module.
        mesh: what it is sharded over.
        index: which replica this is.
    """

    replaces_saved = False

    def __init__(self, module: nn.Module, mesh: DeviceMesh, index: int) -> None:
        self.index = index
        self.shards: Mapping[Tensor, Tensor] = {p: _local_shard(p) for p in module.parameters()}
        self._modules = [m for m in module.modules() if isinstance(m, FSDPModule)]
        # The innermost dimension is the one that shards; with HSDP the outer one replicates, and all replicas have equal norms.
        self._group = mesh.get_group(mesh.ndim - 1)

    @contextmanager
    def forward_on(self, params: Sequence[Tensor], tensors: Sequence[Tensor] | None) -> Iterator[None]:
        """Gather from ``tensors``; afterwards whole parameters are freed, those of the root included."""
        with _values_exchanged(params, tensors):
            try:
                yield
            finally:
                for module in self._modules:
                    # Whole weights of this version must not be found again by the backward, which runs on another one.
                    module.reshard()

    @contextmanager
    def backward_on(self, params: Sequence[Tensor], tensors: Sequence[Tensor] | None) -> Iterator[None]:
        """As :meth:`forward_on`."""
        for part in self.shards.values():
            part.grad = None
        with self.forward_on(params, tensors):
            device = params[0].device if params else torch.device("cpu")
            if device.type != "cpu":  # gathers for a backward run in a stream that does not wait for what changed the shards
                torch.accelerator.current_stream(device).synchronize()
            yield

    def finish(self) -> bool:
        """The mean is there; let the shards have their part of it."""
        for p, part in self.shards.items():
            # Both share memory: what clipping does to the shard is seen by the parameter, which the optimizer holds.
            part.grad = p.grad.to_local() if isinstance(p.grad, DTensor) else None
        return False

    def whole_norm(self, norm: Tensor) -> Tensor:
        """The norm of the whole gradient from that of this process's shards."""
        # In float64, since squares of float32 norms may overflow.
        square = norm.double().square()
        dist.all_reduce(square, group=self._group)
        return square.sqrt().to(norm.dtype)

    def summed(self, numbers: Tensor) -> Tensor:
        """Over the shards: with HSDP, replicas of them have equal numbers."""
        dist.all_reduce(numbers, group=self._group)
        return numbers


def _local_shard(p: Tensor) -> Tensor:
    assert isinstance(p, DTensor)
    local: Tensor = p.detach().to_local()  # type: ignore[attr-defined]
    return local.requires_grad_(p.requires_grad)


@contextmanager
def _values_exchanged(params: Sequence[Tensor], tensors: Sequence[Tensor] | None) -> Iterator[None]:
    """Let two lists of tensors hold each other's values inside the block."""
    if tensors is None:
        yield
        return
    _exchange_values(params, tensors)
    try:
        yield
    finally:
        _exchange_values(params, tensors)


@torch.no_grad()
def _exchange_values(first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    for a, b in zip(first, second, strict=True):
        # One tensor at a time, so that the exchange costs the memory of the largest shard and not of all.
        kept = a.clone()
        a.copy_(b)
        b.copy_(kept)
