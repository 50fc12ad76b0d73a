"""What every block costs on the device it will run on: seconds of F and B, bytes of activations and weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from pipeoptim.engine.transport.pytree import as_args, differentiable
from pipeoptim.errors import ConfigError


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
    microbatches: int = 1,
) -> list[BlockCost]:
    """Run ``blocks`` one after the other, F and B of each, ``repeats`` times over, and take each one's median.

    As in training, all other blocks have run since a block's last turn, and the gradients of a mini-batch are new ones, to
    which its later micro-batches add theirs. The blocks are left as they were: gradients are dropped, buffers and random state restored.

    Args:
        blocks: modules on the device to measure.
        sample_args: a micro-batch as the first block takes it, of the size that training will have.
        names: of the blocks.
        repeats: mini-batches, after a micro-batch that counts bytes and no time.
        sample_kwargs: keyword arguments of the first.
        microbatches: of a mini-batch, whose costs are returned.

    Raises:
        ConfigError: a block does not run on what the one before it returns.
    """
    with torch.enable_grad(), undisturbed(nn.ModuleList(blocks)):
        named, kwargs = list(zip(names, blocks, strict=True)), sample_kwargs or {}
        sizes = _round(named, sample_args, kwargs, _counted)
        rounds = [
            _round(named, sample_args, kwargs, _timed, last=n % microbatches == microbatches - 1)
            for n in range(repeats * microbatches)
        ]
    costs = []
    for i, (name, block) in enumerate(named):
        forward, backward = (minibatch([each[i][part] for each in rounds], microbatches) for part in range(2))
        output, saved = (size * microbatches for size in sizes[i])
        costs.append(BlockCost(name, forward, backward, output, saved, sum(p.nbytes for p in block.parameters())))
    return costs


def minibatch(seconds: Sequence[float], microbatches: int) -> float:
    """The median mini-batch, from the times of micro-batches in a row.

    >>> minibatch([3, 1, 3, 2, 3, 9], 2)
    5
    """
    return median(sum(seconds[n : n + microbatches]) for n in range(0, len(seconds), microbatches))


_Pair = TypeVar("_Pair")


def _round(
    blocks: Sequence[tuple[str, nn.Module]],
    value: Any,
    kwargs: dict[str, Any],
    run: Callable[[nn.Module, Any, dict[str, Any]], tuple[Any, _Pair]],
    last: bool = True,
) -> list[_Pair]:
    """What ``run`` says of every block; the ``last`` micro-batch of a mini-batch drops its gradients."""
    found = []
    for name, block in blocks:
        try:
            output, pair = run(block, tree_map(_received, value), kwargs)
        except Exception as error:
            raise ConfigError(
                f"block {name} does not run on what it is given ({type(error).__name__}: {error}); pass one mini-batch as the first "
                "block takes it, on the model's device, and blocks that take what the one before them returns"
            ) from error
        found.append(pair)
        if last:
            drop_gradients(block)
        value, kwargs = tree_map(_cut, as_args(output)), {}
    return found


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Restore buffers, gradients and the random state afterwards."""
    buffers = {key: b.detach().clone() for key, b in module.named_buffers()}
    # References: gradients are set aside, not copied, and put back.
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
    """The output of ``block``; seconds of F and of B."""
    wait()
    start = time.perf_counter()
    output = block(*args, **kwargs)
    wait()
    forward = time.perf_counter() - start
    roots, gradients = arriving(as_args(output))
    wait()
    start = time.perf_counter()
    if roots:
        torch.autograd.backward(roots, gradients)
    wait()
    return output, (forward, time.perf_counter() - start)


def _counted(block: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, tuple[int, int]]:
    """The output of ``block``; its bytes, and those that autograd keeps."""
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}  # they are there anyway, so they do not count
    kept: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        # By storage: a view of a weight costs no memory, and a tensor saved twice costs it once.
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        output = block(*args, **kwargs)
    roots, gradients = arriving(as_args(output))
    if roots:
        torch.autograd.backward(roots, gradients)
    return output, (nbytes(output), sum(kept.values()))


def arriving(output: Any) -> tuple[list[Tensor], list[Tensor]]:
    """What a backward starts with: the tensors of ``output`` that take a gradient, and one for each, as from the next stage."""
    roots = differentiable(output)
    return roots, [torch.ones_like(root) for root in roots]


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
