"""The replicas of one stage: who they are, equal settings and equal weights at the start, a common stop, and a heartbeat."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from pipeoptim.engine.processes.agreement import SharedSettings
from pipeoptim.engine.processes.collectives import all_gather_plain
from pipeoptim.engine.processes.heartbeat import Heartbeat
from pipeoptim.engine.processes.rendezvous import Rendezvous
from pipeoptim.engine.replicas.reduction import BucketedReduction, DDPReduction, failure
from pipeoptim.engine.replicas.sharded import ShardedReduction, sharding_mesh
from pipeoptim.engine.replicas.verdict import SharedVerdict
from pipeoptim.engine.stage.master_weights import module_parameter
from pipeoptim.engine.stage.reduction import Reduction
from pipeoptim.errors import ConfigError


@dataclass(frozen=True)
class Replicas:
    """The processes that hold the same stage.

    Attributes:
        ranks: their global ranks; the weights of the first are those that all start from.
        index: which of them this process is.
    """

    ranks: tuple[int, ...] = (0,)
    index: int = 0

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.ranks)


def read_replicas(given: dist.ProcessGroup | DeviceMesh | None, module: nn.Module) -> Replicas:
    """The replicas that ``replicas=`` names, or those of a wrapper around the module.

    Raises:
        ConfigError: neither a process group nor a device mesh, this process is not in it, or the wrapper knows others.
    """
    wrapped = module.process_group if isinstance(module, DistributedDataParallel) else sharding_mesh(module)
    if given is None:
        given = wrapped
    if given is None:
        return Replicas()
    ranks = replica_ranks(given)
    if wrapped is not None and replica_ranks(wrapped) != ranks:
        raise ConfigError(f"replicas holds the ranks {ranks}, the stage's module {replica_ranks(wrapped)}; leave replicas out")
    own = dist.get_rank()
    if own not in ranks:
        raise ConfigError(f"replicas holds the ranks {ranks}, but not this process ({own}); give the group of this stage")
    if len(ranks) == 1 and wrapped is not None and not isinstance(module, DistributedDataParallel):
        raise ConfigError("fully_shard over one process shards nothing; leave it out, or give it the mesh of the replicas")
    return Replicas(ranks, ranks.index(own))


def replica_ranks(given: dist.ProcessGroup | DeviceMesh) -> tuple[int, ...]:
    """The global ranks of what users give as ``replicas``.

    Raises:
        ConfigError: it is something else.
    """
    if isinstance(given, DeviceMesh):
        return tuple(int(rank) for rank in given.mesh.flatten())
    if isinstance(given, dist.ProcessGroup):
        return tuple(dist.get_process_group_ranks(given))
    raise ConfigError(
        f"replicas is a {type(given).__name__}, must be the process group of the processes that hold the same stage, "
        'or that dimension of a DeviceMesh: mesh["data"]'
    )


class ReplicaSet:
    """The connections of this process to the other replicas of stage ``k``.

    Args:
        replicas: who they are; at least two.
        k, depth: the stage, of how many.
        timeout: seconds to wait for them.
        settings: those that must be equal on all of them.

    Raises:
        ConfigError: they hold another stage, or were given other settings.
    """

    def __init__(self, replicas: Replicas, k: int, depth: int, timeout: float, settings: SharedSettings) -> None:
        self.replicas, self.k, self.depth, self.timeout = replicas, k, depth, timedelta(seconds=timeout)
        # One per stage: the replicas of different stages are different processes.
        self.rendezvous = Rendezvous("replicas", replicas.ranks, timeout, f"replica {{}} of stage {k}")
        self._votes: deque[tuple[Any, Tensor]] = deque()
        self._changes = 0  # of the number of micro-batches, each of which all agree on
        self._heartbeat: Heartbeat | None = None
        place = f"stage {k} of {depth}"
        for rank, text in zip(replicas.ranks, self.rendezvous.exchange_settings(f"{place}\n{settings.write()}"), strict=True):
            theirs, given = text.split("\n", 1)
            if theirs != place:
                raise ConfigError(f"replicas holds {place} and, on rank {rank}, {theirs}; give the group of one stage")
            settings.compare(SharedSettings.read(given), place, f"its replica on rank {rank}")
        self.rendezvous.group("control", "gloo")  # made while all are here

    @property
    def control(self) -> dist.ProcessGroup:
        """A group on the CPU, for everything but gradients."""
        return self.rendezvous.group("control", "gloo")

    def start_heartbeat(self, liveness: float, on_dead: Callable[[str], None]) -> None:
        """Call ``on_dead`` when another replica gives no sign of life for ``liveness`` seconds."""
        self._heartbeat = self.rendezvous.heartbeat(liveness, on_dead)

    def gather(self, value: Any) -> list[Any]:
        """The values of all replicas, in their order: tensors and plain data. All of them call this."""
        try:
            return all_gather_plain(value, self.control)
        except RuntimeError as error:
            raise failure(error) from error

    def reduction(self, module: nn.Module, optimizer: Optimizer | None, uneven: bool, skips: bool) -> Reduction:
        """What averages the gradients of this stage, and where bad mini-batches are left out (``skips``), shares verdicts about them.

        All replicas start from the weights of the first.
        """
        verdict = SharedVerdict(self.control, self.timeout) if skips else None
        parameters = [] if optimizer is None else [p for group in optimizer.param_groups for p in group["params"]]
        # Masters get their gradients only after the backward, from the module's: the averaging of a wrapper does not know them.
        mastered = any(module_parameter(p) is not p for p in parameters)
        mesh = sharding_mesh(module)
        if mesh is not None or isinstance(module, DistributedDataParallel):
            by = "fully_shard" if mesh is not None else "DistributedDataParallel"
            for refused, what in ((mastered, "master weights"), (uneven, "uneven micro-batches, which may be empty,")):
                if refused:
                    raise ConfigError(
                        f"{by} averages gradients by itself and knows no {what}; give the bare module and replicas="
                    )
            if mesh is not None:
                return ShardedReduction(module, mesh, self.replicas.index)
            return DDPReduction(module, self.replicas.index, verdict)  # type: ignore[arg-type]
        ranks = self.replicas.ranks
        group = self.rendezvous.group("gradients")
        # Masters too, since float32 values that round alike may differ.
        broadcast_values([*module.parameters(), *module.buffers(), *(parameters if mastered else [])], group, ranks[0])
        return BucketedReduction(parameters, group, self.replicas.index, self.timeout, verdict, during_backward=not mastered)

    def agree_to_stop(self, wanted: bool) -> bool:
        """Whether any replica wanted to stop some mini-batches ago; the same answer on all of them at the same mini-batch."""
        vote = torch.tensor([int(wanted)])
        try:
            self._votes.append((dist.all_reduce(vote, dist.ReduceOp.MAX, group=self.control, async_op=True), vote))
            # Read some mini-batches later, so that nobody waits: by then all replicas have voted.
            if len(self._votes) <= self.depth:
                return False
            work, vote = self._votes.popleft()
            work.wait(self.timeout)
        except RuntimeError as error:
            raise failure(error) from error
        return bool(vote.item())

    def agree_on_microbatches(self, m: int, fed: int) -> None:
        """Before mini-batch ``fed``, M becomes ``m`` on all replicas.

        Raises:
            ConfigError: another one was given another number, or at another mini-batch.
        """
        self._changes += 1
        own = f"{m} micro-batches before mini-batch {fed}"
        for rank, theirs in zip(
            self.replicas.ranks,
            self.rendezvous.all_gather(f"microbatches/{self._changes}", own, "in set_microbatches()"),
            strict=True,
        ):
            if theirs != own:
                raise ConfigError(
                    f"set_microbatches() was called for {own} here, for {theirs} in the replica on rank {rank}; give all the same"
                )

    def interrupt(self) -> None:
        """End a wait of this process for its replicas, from another thread, and all later ones."""
        self.rendezvous.interrupt()

    def close(self, wait: bool) -> None:
        """Stop the watch and give back the groups."""
        if self._heartbeat is not None:
            self._heartbeat.close()
            self._heartbeat = None
        # They hold the group, which ends with its last reference.
        self._votes.clear()
        self.rendezvous.close(wait)


def broadcast_values(tensors: Sequence[Tensor], group: dist.ProcessGroup, source: int) -> None:
    """Give every replica the values of the process with global rank ``source``."""
    with torch.no_grad():
        for tensor in tensors:
            # Collectives want contiguous memory; where it is a copy, the result must be copied back.
            value = tensor.detach().contiguous()
            dist.broadcast(value, source, group=group)
            tensor.copy_(value)
