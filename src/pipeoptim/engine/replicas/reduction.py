"""The mean of the gradients over the replicas of a stage, before its update and overlapped with its backward.

A *replica* is a copy of the whole pipeline that trains on other samples. Nothing here knows of other stages, and nothing in
the order of work changes, so version gaps are those of one pipeline.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeoptim.engine.replicas.verdict import SharedVerdict
from pipeoptim.engine.stage.reduction import NoReplicas
from pipeoptim.errors import ConfigError, PipeOptimError, StageFailure, first_line
from pipeoptim.weights import swapped

BUCKET_BYTES = 25 * 2**20
"""Gradients are reduced in buckets of about this size, as ``DistributedDataParallel`` does."""


class BucketedReduction(NoReplicas):
    """All-reduces gradients in buckets, each as soon as the last micro-batch's backward has written all of it.

    A parameter that got no gradient on this replica takes part with zeros; it keeps None where no replica had one, so that
    optimizers skip it everywhere. Buckets start in one fixed order, so replicas whose graphs differ agree all the same.

    Args:
        params: what the optimizer holds.
        group: a group of the replicas that nobody else uses.
        index: which replica this is.
        timeout: to wait for the others.
        verdict: tells the replicas which mini-batches are bad; None where none is left out.
        during_backward: whether gradients arrive in ``params`` themselves during the backward (masters get theirs later).
    """

    deferred = True

    def __init__(
        self,
        params: Sequence[Tensor],
        group: dist.ProcessGroup,
        index: int,
        timeout: timedelta,
        verdict: SharedVerdict | None = None,
        during_backward: bool = True,
    ) -> None:
        self.group: dist.ProcessGroup | None = group
        self.index, self.timeout, self.verdict = index, timeout, verdict
        self.buckets = _make_buckets([p for p in params if p.requires_grad])
        self._bucket_index = {p: n for n, bucket in enumerate(self.buckets) for p in bucket.params}
        self._missing: list[set[Tensor]] = []  # per bucket, in a last backward: parameters whose gradient is still to come
        self._next = len(self.buckets)  # buckets before this one have been started
        self._counting = False
        hooked = self._bucket_index if during_backward else ()
        # After the accumulation: p.grad is then the sum over the mini-batch, and not only the last micro-batch's gradient.
        self._hooks = [p.register_post_accumulate_grad_hook(self._gradient_arrived) for p in hooked]  # type: ignore[no-untyped-call]

    def before_backward(self, last: bool, outputs: Sequence[Tensor]) -> None:
        """From now on each gradient that arrives is final, if ``last``."""
        # In earlier micro-batches gradients still grow: their arrivals count for nothing.
        self._counting = last
        if last:
            self._missing = [set(bucket.params) for bucket in self.buckets]
            self._next = 0

    def _gradient_arrived(self, p: Tensor) -> None:
        if not self._counting:
            return
        if self._bucket_index[p] < self._next:
            raise PipeOptimError(
                f"a gradient of shape {tuple(p.shape)} changed after its mean over the replicas was begun; use "
                "checkpoint(..., use_reentrant=False), or use each weight in one checkpointed part only"
            )
        self._missing[self._bucket_index[p]].discard(p)
        # Strictly in order: collectives are matched by order, and replicas may finish their buckets in another one.
        while self._next < len(self.buckets) and not self._missing[self._next]:
            self._reduce_bucket(self._next)

    def start(self, bad: bool) -> None:
        """Reduce what has not been started yet, and tell the verdict."""
        self._counting = False
        while self._next < len(self.buckets):
            self._reduce_bucket(self._next)
        _tell(self.verdict, bad)

    def _reduce_bucket(self, n: int) -> None:
        assert self.group is not None, "closed"
        try:
            self.buckets[n].reduce(self.group)
        except RuntimeError as error:
            raise failure(error) from error
        self._next = n + 1

    def abandon(self) -> None:
        """Forget the buckets that were started."""
        self._counting, self._next = False, len(self.buckets)
        for bucket in self.buckets:
            bucket.abandon()
        if self.verdict is not None:
            self.verdict.abandon()

    def finish(self) -> bool:
        """Wait for all buckets, and write the means into the gradients."""
        for bucket in self.buckets:
            try:
                bucket.finish(self.timeout)
            except RuntimeError as error:
                raise failure(error) from error
        return _heard(self.verdict)

    def summed(self, numbers: Tensor) -> Tensor:
        """By a collective of its own, between those of two mini-batches."""
        assert self.group is not None, "closed"
        return _summed(numbers, self.group)

    def close(self) -> None:
        """Take the hooks off the parameters, and let go of the group."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self.buckets, self.group = [], [], None


class DDPReduction(NoReplicas):
    """The stage's module is wrapped in ``DistributedDataParallel``, whose own buckets and hooks do the work.

    Forwards run under ``no_sync``, because several of them come before one backward; the reducer is armed just before the
    last backward of a mini-batch, and that backward ends with the mean in place.

    Raises:
        ConfigError: the wrapper was made with static_graph=True, which counts on one backward per forward.
    """

    def __init__(self, module: DistributedDataParallel, index: int, verdict: SharedVerdict | None = None) -> None:
        if module.static_graph:
            raise ConfigError(
                "DistributedDataParallel(static_graph=True) counts on one backward per forward, which no pipeline has; "
                "leave static_graph out, or give the bare module and replicas="
            )
        self.module: DistributedDataParallel = module
        self.index, self.verdict = index, verdict

    def unwrapped(self, module: nn.Module) -> nn.Module:
        """What is wrapped."""
        return self.module.module  # type: ignore[no-any-return]

    @contextmanager
    def forward_on(self, params: Sequence[Tensor], tensors: Sequence[Tensor] | None) -> Iterator[None]:
        """No exchange between replicas, neither of gradients nor of buffers."""
        with swapped(params, tensors), self.module.no_sync():
            yield

    def before_backward(self, last: bool, outputs: Sequence[Tensor]) -> None:
        """Arm the reducer."""
        if last:
            # What DDP's own forward does at its end, which no_sync() leaves out.
            self.module.reducer.prepare_for_backward(list(outputs))

    def start(self, bad: bool) -> None:
        """The mean is begun by the backward; tell the verdict."""
        _tell(self.verdict, bad)

    def finish(self) -> bool:
        """The mean is there."""
        return _heard(self.verdict)

    def abandon(self) -> None:
        """Forget what was told."""
        if self.verdict is not None:
            self.verdict.abandon()

    def summed(self, numbers: Tensor) -> Tensor:
        """By a collective of its own, between two backwards."""
        return _summed(numbers, self.module.process_group)


class _Bucket:
    """Parameters of one device and type whose gradients travel together."""

    def __init__(self, params: list[Tensor]) -> None:
        self.params = params
        self._work: Any = None
        self._sum: Tensor | None = None
        self._presence: tuple[list[bool], Tensor] = ([], torch.empty(0))

    def reduce(self, group: dist.ProcessGroup) -> None:
        """Start the all-reduce. Behind the gradients travels, for each of them, whether it is there."""
        first = self.params[0]
        found = [p.grad is not None for p in self.params]
        if found != self._presence[0]:
            self._presence = found, torch.tensor(found, dtype=first.dtype, device=first.device)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        # Divided before the sum, not after: in low precision a sum overflows where a mean does not.
        self._sum = torch.cat([*(g.detach().reshape(-1) for g in grads), self._presence[1]]).div_(group.size())
        self._work = dist.all_reduce(self._sum, group=group, async_op=True)

    def abandon(self) -> None:
        """Forget the all-reduce; its tensor lives as long as the transport needs it."""
        self._work = self._sum = None

    def finish(self, timeout: timedelta) -> None:
        """Write the means back."""
        assert self._sum is not None
        self._work.wait(timeout)
        *means, there = self._sum.split([*(p.numel() for p in self.params), len(self.params)])  # type: ignore[no-untyped-call]
        for n, (p, mean) in enumerate(zip(self.params, means, strict=True)):
            if p.grad is not None:
                # Into the gradient's own memory: the optimizer, and hooks of the user, may hold it.
                p.grad.copy_(mean.view_as(p))
            # Some replica had a gradient: here it was zeros in the sum, and the mean is the gradient.
            elif there[n] > 0:
                p.grad = mean.view_as(p).clone()
        self._work = self._sum = None


def _make_buckets(params: list[Tensor]) -> list[_Bucket]:
    """In the order in which a backward reaches them: the last parameters first."""
    full: list[list[Tensor]] = []
    open_: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for p in reversed(params):
        bucket = open_.setdefault((p.device, p.dtype), [])
        bucket.append(p)
        if sum(q.numel() * q.element_size() for q in bucket) >= BUCKET_BYTES:
            # Closed here and not at an exact size: a gradient is never split over two buckets.
            full.append(open_.pop((p.device, p.dtype)))
    return [_Bucket(bucket) for bucket in [*full, *open_.values()]]


def _tell(verdict: SharedVerdict | None, bad: bool) -> None:
    if verdict is not None:
        try:
            verdict.tell(bad)
        except RuntimeError as error:
            raise failure(error) from error


def _heard(verdict: SharedVerdict | None) -> bool:
    try:
        return verdict is not None and verdict.hear()
    except RuntimeError as error:
        raise failure(error) from error


def _summed(numbers: Tensor, group: dist.ProcessGroup) -> Tensor:
    try:
        dist.all_reduce(numbers, group=group)
    except RuntimeError as error:
        raise failure(error) from error
    return numbers


def failure(error: RuntimeError) -> StageFailure:
    """What a broken or overdue exchange between replicas means."""
    first = first_line(error)
    return StageFailure(f"a replica of this stage died or does not answer ({first})")
