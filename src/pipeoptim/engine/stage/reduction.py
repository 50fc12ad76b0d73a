"""What a stage asks of its replicas: at which points of its work gradients become their mean, and which weights the module then has.

The stage knows only this; :mod:`pipeoptim.engine.replicas` carries it out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any, Protocol

from torch import Tensor, nn

from pipeoptim.weights import swapped


class Reduction(Protocol):
    """How the gradients of a stage become the mean over its replicas. The stage calls these at fixed points.

    Attributes:
        index: which replica this is.
        deferred: whether there is something to gain in carrying out an update as late as its weights allow.
        replaces_saved: whether weights that autograd saved must be looked up again when a backward runs on others.
        shards: what this process holds of a parameter, for those of which it does not hold all.
    """

    index: int
    deferred: bool
    replaces_saved: bool
    shards: Mapping[Tensor, Tensor]

    def unwrapped(self, module: nn.Module) -> nn.Module:
        """The user's own module in what may be a wrapper: evaluated and saved."""
        ...

    def forward_on(self, params: Sequence[Tensor], tensors: Sequence[Tensor] | None) -> AbstractContextManager[Any]:
        """What the stage's forward runs in; ``params`` have the values of ``tensors`` there, their own where it is None."""
        ...

    def backward_on(self, params: Sequence[Tensor], tensors: Sequence[Tensor] | None) -> AbstractContextManager[Any]:
        """What the stage's backward runs in, as :meth:`forward_on`."""
        ...

    def before_backward(self, last: bool, outputs: Sequence[Tensor]) -> None:
        """B of a micro-batch begins; ``last``: of its mini-batch."""
        ...

    def start(self, bad: bool) -> None:
        """All gradients of the mini-batch are there; does not wait. ``bad``: whether its update is to be left out."""
        ...

    def finish(self) -> bool:
        """Wait until the gradients are the mean over the replicas. Whether the mini-batch is bad on any of them, where they agree on it."""
        ...

    def whole_norm(self, norm: Tensor) -> Tensor:
        """The norm of the stage's gradient, from that of the parts that this process holds."""
        ...

    def summed(self, numbers: Tensor) -> Tensor:
        """The sum over the replicas, written into ``numbers``; waits for them."""
        ...

    def abandon(self) -> None:
        """Forget the averages that were begun."""
        ...

    def close(self) -> None:
        """Nothing is left to average: release groups and the module's hooks."""
        ...


class NoReplicas:
    """A stage without replicas."""

    index = 0
    deferred = False
    replaces_saved = True
    # Read-only, since all stages without replicas share this object.
    shards: Mapping[Tensor, Tensor] = MappingProxyType({})

    def unwrapped(self, module: nn.Module) -> nn.Module:
        """The module."""
        return module

    def forward_on(self, params: Sequence[Tensor], tensors: Sequence[Tensor] | None) -> AbstractContextManager[Any]:
        """Point to the tensors."""
        return swapped(params, tensors)

    def backward_on(self, params: Sequence[Tensor], tensors: Sequence[Tensor] | None) -> AbstractContextManager[Any]:
        """Nothing to do: saved weights are looked up by place."""
        return nullcontext()

    def before_backward(self, last: bool, outputs: Sequence[Tensor]) -> None:
        """Nothing to do."""

    def start(self, bad: bool) -> None:
        """Nothing to do."""

    def finish(self) -> bool:
        """Nothing to do."""
        return False

    def whole_norm(self, norm: Tensor) -> Tensor:
        """The same."""
        return norm

    def summed(self, numbers: Tensor) -> Tensor:
        """The same."""
        return numbers

    def abandon(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


NO_REPLICAS = NoReplicas()
