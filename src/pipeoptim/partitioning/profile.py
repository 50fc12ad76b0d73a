"""What every block costs on the device it will run on: seconds of F and B, bytes of activations and weights."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from pipeoptim.engine.tree import as_args, differentiable


@dataclass(frozen=True)
class BlockCost:
    """The cost of one block for one mini-batch.

    Attributes:
        name: of the block.
        forward, backward: seconds.
        output_bytes: of what it hands to the next block, which is what a cut behind it would send.
        saved_bytes: of what autograd keeps from F to B, weights not counted.
        weight_bytes: of its parameters.
    """

    name: str
    forward: float
    backward: float
    output_bytes: int
    saved_bytes: int
    weight_bytes: int

    @property
    def seconds(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward


def profile(
    blocks: Sequence[nn.Module],
    sample_args: tuple[Any, ...],
    names: Sequence[str],
    repeats: int = 7,
    sample_kwargs: dict[str, Any] | None = None,
) -> list[BlockCost]:
    """Run ``blocks`` one after the other, F and B of each, ``repeats`` times over, and take each one's median.

    As in training, all other blocks have run since a block's last turn, and its gradients are new, not added to old ones.
    The blocks are left as they were: gradients are dropped, buffers and random state restored.

    Args:
        blocks: modules on the device to measure.
        sample_args: input of the first, of the size that training will have.
        names: of the blocks.
        repeats: runs of all blocks, after one that counts bytes and no time.
        sample_kwargs: keyword arguments of the first.
    """
    with torch.enable_grad(), undisturbed(nn.ModuleList(blocks)):
        sizes, *rounds = [_round(blocks, sample_args, sample_kwargs or {}, count=n == 0) for n in range(repeats + 1)]
    costs = []
    for i, (name, block) in enumerate(zip(names, blocks, strict=True)):
        forward, backward = (median(each[i][part] for each in rounds) for part in range(2))
        output, saved = sizes[i]
        costs.append(BlockCost(name, forward, backward, int(output), int(saved), sum(p.nbytes for p in block.parameters())))
    return costs


def _round(blocks: Sequence[nn.Module], value: Any, kwargs: dict[str, Any], count: bool) -> list[tuple[float, float]]:
    """Seconds of F and B of every block, or the bytes of its output and those that autograd kept."""
    found = []
    for block in blocks:
        args = tree_map(_received, value)
        output, pair = (_counted if count else _timed)(block, args, kwargs)
        found.append(pair)
        drop_gradients(block)
        value, kwargs = tree_map(_cut, as_args(output)), {}
    return found


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Afterwards buffers, gradients and the random state are as before, whatever ran."""
    buffers = {key: b.detach().clone() for key, b in module.named_buffers()}
    gradients = {p: p.grad for p in module.parameters()}
    devices = {p.device for p in module.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=sorted(devices, key=str)):
            drop_gradients(module)
            yield
    finally:
        with torch.no_grad():
            for key, b in module.named_buffers():
                b.copy_(buffers[key])
        for p, gradient in gradients.items():
            p.grad = gradient


def _timed(block: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, tuple[float, float]]:
    wait()
    start = time.perf_counter()
    output = block(*args, **kwargs)
    wait()
    middle = time.perf_counter()
    _backward(output)
    wait()
    return output, (middle - start, time.perf_counter() - middle)


def _counted(block: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, tuple[float, float]]:
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
    kept: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        output = block(*args, **kwargs)
    _backward(output)
    return output, (nbytes(output), sum(kept.values()))


def _backward(output: Any) -> None:
    roots = differentiable(as_args(output))
    if roots:
        torch.autograd.backward(roots, [torch.ones_like(r) for r in roots])


def _cut(value: Any) -> Any:
    """What the next block gets: without the graph, with a gradient only where one can flow."""
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def _received(value: Any) -> Any:
    """A copy that the block may change in place."""
    return value.clone() if isinstance(value, Tensor) else value


def drop_gradients(module: nn.Module) -> None:
    """Of its parameters, so that the next backward makes new ones."""
    for p in module.parameters():
        p.grad = None


def wait() -> None:
    """For everything that the device has been given to do."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def nbytes(tree: Any) -> int:
    """Bytes of all tensors in ``tree``."""
    return sum(leaf.nbytes for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
