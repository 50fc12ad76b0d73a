"""Fewer bytes between stages: activations and their gradients as bfloat16 or int8, for links that are slower than the stages.

The sender packs a tree of tensors into another, which is sent like any other message, and the receiver unpacks it. All engines
do the same, so the emulator computes what processes compute, bit for bit.

Compression loses something, and what *error feedback* can do about it depends on what is compressed. Data-parallel training sends
the gradient of the same weights again and again; what one message lost is added to the next, and the weights, which only see the
sum over time, lose nothing (Seide et al. 2014; Karimireddy et al. 2019, arXiv 1901.09847; torch's PowerSGD hook). Between stages
the next message is about *other samples*. What the message of a micro-batch lost is here added to the next message of the same
position in its mini-batch, so the sum over time of what arrives is still right, but what arrives at one time is wrong by the
residual of another sample. For gradients that repairs what the receiver sums without looking at the sample, such as the gradient of a
bias; the gradient of a matrix multiplies the residual by another sample's input. For activations a non-linear stage follows, which
does not see sums, so there is no such argument. AQ-SGD (Wang et al. 2022, arXiv 2206.01299) keeps the last activation of every
*sample* of the data set instead, on both ends, and sends differences, which needs that memory and samples that come back; it is not
done here. Rudakov et al. (2024, arXiv 2401.07788) found no gain from error feedback between stages, and that gradients bear less
compression than activations. So it is off by default; docs/performance.md shows what it does to the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from pipeoptim.engine.transport.pytree import portable
from pipeoptim.errors import ConfigError

KINDS = ("bf16", "int8")
FEEDBACKS = ("none", "gradients", "activations", "both")
ROW = 32
"""Numbers that share a scale, at least; tensors with fewer are sent as they are, which the help of ``compress`` says."""

_TYPES = {"bf16": (torch.float32,), "int8": (torch.float32, torch.float16, torch.bfloat16)}
_LEAST_SCALE = torch.finfo(torch.float32).tiny  # a row of zeros must not be divided by zero


@dataclass(frozen=True)
class Compression:
    """What travels between stages in fewer bytes; ``compress="int8"`` is short for ``Compression("int8", "int8")``.

    ``"bf16"`` rounds float32 to bfloat16: half of the bytes, at most 2^-8 of each number lost. ``"int8"`` sends
    ``q = round(x / scale)`` with one float32 ``scale = max|x| / 127`` per row: at most ``scale / 2`` of each number lost. A row is
    the last dimension, or as many of the last ones as it takes to have 32 numbers. Float32, float16 and bfloat16 become a quarter or half
    of their bytes. float64 (whoever asks for it wants the digits), integers and tensors of fewer than 32 numbers are sent as they
    are. The receiver gets the types that the sender had. A number that is not finite stays so as bf16, and with int8 its row
    becomes NaN, so that loss scaling notices.

    :meth:`eval_step <pipeoptim.Emulator.eval_step>` compresses nothing: it tells the loss of the weights that are saved.

    Args:
        activations, gradients: ``"bf16"``, ``"int8"`` or None, of what goes forward and of what goes back.
        error_feedback: ``"gradients"``, ``"activations"`` or ``"both"``: what a message lost is added to the next one of the same
            micro-batch position (see :mod:`pipeoptim.engine.transport.compression` for what that means and does not mean). A tensor whose
            shape has changed begins anew; a changed loss scale is divided out. Costs a copy of a mini-batch's messages in float32.

    Raises:
        ConfigError: another name, or feedback of what is not compressed.

    Example:
        >>> import torch, pipeoptim as po
        >>> stages = [torch.nn.Linear(4, 64), torch.nn.Linear(64, 1)]
        >>> compress = Compression("int8", "bf16", error_feedback="gradients")
        >>> pipe = po.Emulator(
        ...     stages, lambda p: torch.optim.SGD(p, lr=0.1), torch.nn.functional.mse_loss, compress=compress
        ... )
        >>> loss = pipe.step(torch.ones(2, 4), target=torch.ones(2, 1))
    """

    activations: str | None
    gradients: str | None
    error_feedback: str = "none"

    def __post_init__(self) -> None:
        if not isinstance(self.error_feedback, str) or self.error_feedback not in FEEDBACKS:
            raise ConfigError(f"error_feedback is {self.error_feedback!r}, must be one of {', '.join(FEEDBACKS)}")
        for what, kind in (("activations", self.activations), ("gradients", self.gradients)):
            if kind is not None and not (isinstance(kind, str) and kind in KINDS):
                raise ConfigError(f"compression of {what} is {kind!r}, must be one of {', '.join(KINDS)}, or None")
            if kind is None and self.feeds(what):
                raise ConfigError(
                    f"error_feedback is {self.error_feedback!r}, but {what} are not compressed and lose nothing; compress them too"
                )

    def feeds(self, what: str) -> bool:
        """Whether ``what`` ("activations" or "gradients") has error feedback."""
        return self.error_feedback in (what, "both")


def as_compression(value: Compression | str | None) -> Compression | None:
    """What users give as ``compress``.

    Raises:
        ConfigError: it is something else.
    """
    if value is None or isinstance(value, Compression):
        return value
    if not isinstance(value, str) or value not in KINDS:
        raise ConfigError(f"compress is {value!r}, must be one of {', '.join(KINDS)}, a pipeoptim.Compression, or None")
    return Compression(value, value)


class Packed(NamedTuple):
    """What is sent in place of a tensor of type ``dtype``."""

    payload: Tensor
    scale: Tensor | None
    dtype: torch.dtype
    requires_grad: bool


def pack_tensor(tensor: Tensor, kind: str) -> Packed:
    """``tensor`` in fewer bytes."""
    # Cut from the graph: the gradient comes back as a message and is given to the stage's own output.
    x = portable(tensor.detach())
    # No scale: bfloat16 has the exponents of float32, so that only digits are lost.
    if kind == "bf16":
        return Packed(x.to(torch.bfloat16), None, tensor.dtype, tensor.requires_grad)
    x = x.float()
    row = _scale_dims(x)
    # Symmetric, so that 0 stays 0. From amax and amin, since abs() would copy the whole tensor.
    scale = torch.maximum(x.amax(row, keepdim=True), -x.amin(row, keepdim=True)).div_(127).clamp_min_(_LEAST_SCALE)
    # Not finite, a row becomes zeros with a scale of NaN or infinity: their product, NaN, shows at the receiver.
    return Packed((x / scale).round_().nan_to_num_(0.0).to(torch.int8), scale, tensor.dtype, tensor.requires_grad)


def unpack_tensor(packed: Packed) -> Tensor:
    """The tensor that the receiver works with, a leaf of a new graph."""
    values = packed.payload if packed.scale is None else packed.payload * packed.scale
    return values.to(packed.dtype).requires_grad_(packed.requires_grad)


def unpack(tree: Any) -> Any:
    """``tree`` as it was before :meth:`CompressedDirection.pack`, but for what the compression lost."""
    return tree_map(lambda leaf: unpack_tensor(leaf) if _is_packed(leaf) else leaf, tree, is_leaf=_is_packed)


def _is_packed(value: Any) -> bool:
    return isinstance(value, Packed)


def _scale_dims(x: Tensor) -> list[int]:
    """The dimensions that share a scale."""
    first, numbers = x.dim(), 1
    # Ends, for tensors with fewer numbers than that were sent as they are.
    while numbers < ROW:
        first -= 1
        numbers *= x.shape[first]
    return list(range(first, x.dim()))


class CompressedDirection:
    """Packs what one stage sends in one direction, and remembers what each message lost.

    Args:
        kind: one of ``KINDS``; None to pass everything on as it is.
        feedback: add what a message lost to the next one of the same position.
        positions: messages per mini-batch, M.

    Attributes:
        lost: position and number of the leaf in its tree -> what the last message lost, and the loss scale that is in it.
    """

    def __init__(self, kind: str | None, feedback: bool, positions: int) -> None:
        self.kind, self.feedback, self.positions = kind, feedback, positions
        self.lost: dict[tuple[int, int], tuple[Tensor, float]] = {}

    def pack(self, i: int, tree: Any, loss_scale: float = 0.0) -> Any:
        """The message of micro-batch ``i``; ``loss_scale`` is in its numbers, 0 for none."""
        if self.kind is None:
            return tree
        leaves, spec = tree_flatten(tree)
        # By position in the mini-batch: messages of one position have one shape, and neighbours are one mini-batch apart.
        place = i % self.positions
        return tree_unflatten([self._pack_leaf((place, n), leaf, loss_scale) for n, leaf in enumerate(leaves)], spec)

    def _pack_leaf(self, key: tuple[int, int], leaf: Any, loss_scale: float) -> Any:
        assert self.kind is not None
        # As in a message without compression; the receiver tells the two apart by the type Packed.
        if not isinstance(leaf, Tensor) or leaf.dtype not in _TYPES[self.kind] or leaf.numel() < ROW:
            return leaf
        if not self.feedback:
            return pack_tensor(leaf, self.kind)
        wanted = portable(leaf.detach()).float()
        lost, of = self.lost.get(key, (None, 0.0))
        if lost is not None and lost.shape == wanted.shape:
            # A loaded checkpoint may hold it on another device.
            share = lost.to(wanted.device)
            # What is lost was measured with the scale of its time: the factor makes it part of today's gradients.
            wanted = wanted + (share * (loss_scale / of) if loss_scale and of and loss_scale != of else share)
        packed = pack_tensor(wanted, self.kind)._replace(dtype=leaf.dtype, requires_grad=leaf.requires_grad)
        # Exactly the numbers that the receiver computes, rounding to the original type included.
        arrives = unpack_tensor(packed).detach().float()
        # An infinity must not stay in the residual, or every later message of this position would be infinite as well.
        self.lost[key] = (wanted - arrives).nan_to_num_(0.0, 0.0, 0.0), loss_scale
        return packed

    def state_dict(self) -> list[Any]:
        """Tensors and plain data."""
        return [[*key, lost, scale] for key, (lost, scale) in self.lost.items()]

    def load_state_dict(self, state: list[Any]) -> None:
        """Take over :meth:`state_dict`; nothing of it without feedback."""
        self.lost = {(place, n): (lost, scale) for place, n, lost, scale in state} if self.feedback else {}


class Compressor:
    """The compression of what one stage sends to its neighbours.

    Args:
        compression: None to pass everything on as it is.
        microbatches: M.
    """

    def __init__(self, compression: Compression | None, microbatches: int) -> None:
        chosen = compression or Compression(None, None)
        self.compression = compression
        self.activations = CompressedDirection(chosen.activations, chosen.feeds("activations"), microbatches)
        self.gradients = CompressedDirection(chosen.gradients, chosen.feeds("gradients"), microbatches)

    def use_positions(self, microbatches: int) -> None:
        """M changes; what was lost at positions that there are no more is forgotten."""
        for direction in (self.activations, self.gradients):
            direction.positions = microbatches
            direction.lost = {key: lost for key, lost in direction.lost.items() if key[0] < microbatches}

    def pack_activations(self, i: int, tree: Any) -> Any:
        """What goes to the next stage instead of the output of micro-batch ``i``."""
        return self.activations.pack(i, tree)

    def pack_gradients(self, i: int, tree: Any, loss_scale: float) -> Any:
        """What goes to the previous stage instead of the gradients of micro-batch ``i``, which have ``loss_scale`` in them."""
        return self.gradients.pack(i, tree, loss_scale)

    def unpack(self, tree: Any) -> Any:
        """What this stage works with instead of what it received."""
        return tree if self.compression is None else unpack(tree)

    def state_dict(self) -> dict[str, Any]:
        """What must be remembered for a resumed run to continue bit for bit; empty without error feedback."""
        directions = {"activations": self.activations, "gradients": self.gradients}
        return {name: direction.state_dict() for name, direction in directions.items() if direction.feedback}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over :meth:`state_dict`; what it does not hold begins anew."""
        self.activations.load_state_dict(state.get("activations", []))
        self.gradients.load_state_dict(state.get("gradients", []))
