"""Activation checkpointing: on which weights the second forward, which runs inside a backward, is made.

``torch.utils.checkpoint`` runs a part of the module again while the backward runs, on whatever weights the module then holds.
``recompute="backward"``: those of the backward (for ``pipeoptim`` the latest), so activations and weights belong together.
``recompute="forward"``: those of the first forward; the backward gets the activations that it would have got without
checkpointing, and its own weights, so that the result is the same bit for bit. That costs a stash of the forward's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch.utils.checkpoint
from torch import Tensor, nn

from pipeoptim.errors import ConfigError
from pipeoptim.weights import SavedWeights, StageWeights, WeightSet, swapped
from pipeoptim.weights.layout import Place, view

KINDS = ("backward", "forward")
_HOOK = "_recomputation_hook"  # torch's own, of checkpoints that are not reentrant


def check_recompute(kind: str, module: nn.Module, replaces_saved: bool) -> None:
    """Raises ConfigError for another kind, and for "forward" where it cannot be exact."""
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(f"recompute is {kind!r}, must be one of {', '.join(KINDS)}")
    if kind == "backward":
        return
    if not replaces_saved:
        raise ConfigError("recompute is 'forward', which sharded stages cannot do; use recompute='backward'")
    if not hasattr(torch.utils.checkpoint, _HOOK):
        raise ConfigError(
            "recompute='forward' does not know the checkpoints of this version of torch; use recompute='backward'"
        )
    if any(type(m).__name__ == "OptimizedModule" or m._compiled_call_impl is not None for m in module.modules()):
        raise ConfigError(
            "recompute is 'forward', but the stage is compiled, and compiled code recomputes on the weights of the backward; "
            "use recompute='backward', or leave torch.compile out"
        )


@contextmanager
def recomputing(weights: StageWeights, again: WeightSet, weight_set: WeightSet) -> Iterator[None]:
    """A backward on the weights ``weight_set`` in this block runs parts of the module again on the weights ``again``.

    Where the two differ, what the second forward saves of its weights is replaced by the same view of ``weight_set``.
    """
    with ExitStack() as stack:
        # The module really holds the forward's weights while it runs again; only what is saved is exchanged.
        stack.enter_context(swapped(weights.params, weights.tensors(again)))
        table, bases = weights.buffers(again).table, weights.buffers(weight_set).bases
        if weights.buffers(again) is not weights.buffers(weight_set):
            hooks = SavedWeights(table)  # reentrant checkpoints build a new graph under these
            hooks.target = bases
            stack.enter_context(hooks)
            stack.enter_context(_hook_replaced(_substituting_hook(table, bases)))
        yield


@contextmanager
def _hook_replaced(hook: type) -> Iterator[None]:
    # torch looks the class up in its module whenever it recomputes, so that replacing it there is enough.
    original = getattr(torch.utils.checkpoint, _HOOK)
    setattr(torch.utils.checkpoint, _HOOK, hook)
    try:
        yield
    finally:
        setattr(torch.utils.checkpoint, _HOOK, original)


def _substituting_hook(table: Mapping[int, int], bases: Sequence[Tensor]) -> type:
    """torch's hook that collects what a second forward saves, told to take weights from ``bases``."""

    class Substituting(getattr(torch.utils.checkpoint, _HOOK)):  # type: ignore[misc]
        def __init__(self, *args: object) -> None:
            super().__init__(*args)
            collect: Callable[[Tensor], object] = self.pack_hook  # type: ignore[has-type]

            def pack(tensor: Tensor) -> object:
                # By storage, as in SavedWeights: a view of a weight counts as the weight.
                number = table.get(tensor.untyped_storage().data_ptr())
                if number is not None:
                    place = Place(number, tensor.size(), tensor.stride(), int(tensor.storage_offset()), tensor.dtype)
                    # torch's hook then keeps this tensor, so that the backward formula reads the backward's weights.
                    tensor = view(bases, place)
                return collect(tensor)

            self.pack_hook = pack

    return Substituting


__all__ = ["KINDS", "check_recompute", "recomputing"]
