"""What every block costs on the device it will run on: seconds of F and B, bytes of activations and weights."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
    repeats: int = 5,
    sample_kwargs: dict[str, Any] | None = None,
) -> list[BlockCost]:
    """Run ``blocks`` one after the other, each ``repeats`` times, and take the least: what else runs on the machine only adds.

    The blocks are left as they were: gradients are dropped, buffers and random state restored.

    Args:
        blocks: modules on the device to measure.
        sample_args: input of the first, of the size that training will have.
        names: of the blocks.
        repeats: runs per block, after one that is not counted.
        sample_kwargs: keyword arguments of the first.
    """
    costs = []
    kwargs = sample_kwargs or {}
    value: Any = sample_args
    with torch.enable_grad():
        for name, block in zip(names, blocks, strict=True):
            with undisturbed(block):
                samples = [_once(block, value, kwargs) for _ in range(repeats + 1)][1:]
            forward, backward = min(s[0] for s in samples), min(s[1] for s in samples)
            output, saved = samples[-1][2:]
            weights = sum(p.nbytes for p in block.parameters())
            costs.append(BlockCost(name, forward, backward, nbytes(output), saved, weights))
            value, kwargs = as_args(output), {}
    return costs


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Afterwards buffers, gradients and the random state are as before, whatever ran."""
    buffers = {key: b.detach().clone() for key, b in module.named_buffers()}
    gradients = {p: p.grad for p in module.parameters()}
    devices = {p.device for p in module.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=sorted(devices, key=str)):
            for p in gradients:
                p.grad = None
            yield
    finally:
        with torch.no_grad():
            for key, b in module.named_buffers():
                b.copy_(buffers[key])
        for p, gradient in gradients.items():
            p.grad = gradient


def _once(block: nn.Module, value: Any, kwargs: dict[str, Any]) -> tuple[float, float, Any, int]:
    """Seconds of F, seconds of B, the detached output, and the bytes that autograd kept."""
    args = tree_map(lambda t: _leaf(t) if isinstance(t, Tensor) else t, value)
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
    kept: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        block(*args, **kwargs)
    wait()
    start = time.perf_counter()
    output = block(*args, **kwargs)
    wait()
    middle = time.perf_counter()
    roots = differentiable(as_args(output))
    if roots:
        torch.autograd.backward(roots, [torch.ones_like(r) for r in roots])
    wait()
    end = time.perf_counter()
    return (
        middle - start,
        end - middle,
        tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, output),
        sum(kept.values()),
    )


def _leaf(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_(t.is_floating_point())


def wait() -> None:
    """For everything that the device has been given to do."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def nbytes(tree: Any) -> int:
    """Bytes of all tensors in ``tree``."""
    return sum(leaf.nbytes for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
