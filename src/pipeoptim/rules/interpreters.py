"""The interpreters of a `Move`: five ways to compute ``W_hat = keep * W - sum(terms)`` into a given buffer.

- `apply_plain`: operation by operation as torch writes the formula, with temporaries. The reference.
- `apply_by_kernel`: one pass over memory in C, for float32 on a CPU.
- `apply_in_place`: for other tensors on a CPU; `out` is its only scratch space.
- `apply_by_triton`: one pass on a GPU, all parameters in one launch, also into a buffer of another type.
- `apply_foreach`: for other tensors on GPUs, and without Triton; one launch per operation for many parameters, one temporary per block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from pipeoptim.kernels import calls, triton_move
from pipeoptim.kernels.library import available
from pipeoptim.kernels.tensor_layout import share_flat_index
from pipeoptim.rules.move import Move, Scalar, Term

ApplyMode = Literal["auto", "plain", "in_place", "foreach", "kernel", "triton"]

BLOCK_ELEMENTS = 1 << 24
"""Elements per foreach block: bounds the temporaries (64 MiB of float32), far above what hides a launch."""

TRITON_ELEMENTS = 1 << 26
"""Elements per Triton launch: bounds the tensors that rules compute for it (256 MiB of float32), and far above a full GPU."""


def apply_plain(weight: Tensor, move: Move, out: Tensor) -> None:
    """The reference: one operation after the other, in the order in which torch's optimizers compute."""
    result = weight if _is_one(move.keep) else weight * move.keep
    for term in move.terms:
        step = term.value
        if term.root is not None:
            step = step / (term.root.sqrt() / term.root_divisor + term.eps)
        # Not addcdiv or alpha=: one rounding per operation, so that this reference is plain to compare with.
        result = result - step * term.scale
    out.copy_(result)


def apply_in_place(weight: Tensor, move: Move, out: Tensor) -> None:
    """No temporaries: `out` holds the denominator first and the result afterwards. Same shape, dtype and device only."""
    if not move.terms:
        torch.mul(weight, move.keep, out=out)
        return
    first, *rest = move.terms
    _write_first_term(weight, first, out)
    # From here on `out` is W - first term, so `keep` is applied to the original weights below.
    for term in rest:
        value = term.value if term.root is None else term.value / _denominator(term)
        _add_scaled(out, value, -term.scale)
    if not _is_one(move.keep):
        _add_scaled(out, weight, move.keep - 1.0)


def _write_first_term(weight: Tensor, term: Term, out: Tensor) -> None:
    """``out = W - term``, with `out` as scratch."""
    scale = term.scale
    if term.root is None:
        if isinstance(scale, Tensor):
            torch.mul(term.value, -scale, out=out)
            out.add_(weight)
        else:
            torch.add(weight, term.value, alpha=-scale, out=out)
        return
    torch.sqrt(term.root, out=out)  # `out` holds the denominator first: no temporary
    if isinstance(scale, Tensor) or isinstance(term.root_divisor, Tensor):
        # alpha= and value= would read the scalar from the device, so every factor is an operation of its own.
        out.div_(term.root_divisor).add_(term.eps)
        torch.div(term.value, out, out=out)
        out.mul_(-scale).add_(weight)
    else:
        # Multiplying numerator and denominator by the divisor saves a pass over memory.
        out.add_(term.eps * term.root_divisor)
        torch.addcdiv(weight, term.value, out, value=-scale * term.root_divisor, out=out)


def _denominator(term: Term) -> Tensor:
    assert term.root is not None
    return term.root.sqrt().div_(term.root_divisor).add_(term.eps)


def _add_scaled(out: Tensor, value: Tensor, scale: Scalar) -> None:
    """``out += scale * value`` without reading an accelerator's scalar."""
    if isinstance(scale, Tensor):
        out.addcmul_(value, scale)
    else:
        out.add_(value, alpha=scale)


def apply_foreach(weights: list[Tensor], moves: list[Move], outs: list[Tensor]) -> None:
    """Many parameters at once. All moves have the `_signature` of the first; all tensors its dtype and device."""
    torch._foreach_copy_(outs, weights)  # everything else happens in place: no temporary but the denominators
    keep = moves[0].keep
    if not _is_one(keep):
        torch._foreach_mul_(outs, keep)
    for terms in zip(*(move.terms for move in moves), strict=True):
        values = [term.value for term in terms]
        if terms[0].root is None:
            # One alpha for the whole list: `_signature` keeps moves of another scale out of the block.
            torch._foreach_add_(outs, values, alpha=-_number(terms[0].scale))
            continue
        denominators = list(torch._foreach_sqrt([term.root for term in terms if term.root is not None]))
        torch._foreach_add_(denominators, [_number(term.eps) * _number(term.root_divisor) for term in terms])
        torch._foreach_addcdiv_(outs, values, denominators, [-_number(t.scale) * _number(t.root_divisor) for t in terms])


def apply_by_kernel(weights: list[Tensor], moves: list[Move], outs: list[Tensor]) -> None:
    """Many parameters, each in one pass. All tensors are `share_flat_index` with their weight, all scalars numbers."""
    calls.run_moves(
        [
            calls.KernelMove(weight, out, tuple(_for_kernel(term) for term in move.terms), 1.0 - _number(move.keep))
            for weight, move, out in zip(weights, moves, outs, strict=True)
        ]
    )


def _for_kernel(term: Term) -> calls.KernelTerm:
    divisor = _number(term.root_divisor)
    return calls.KernelTerm(term.value, _number(term.scale), term.root, 1.0 / divisor, _number(term.eps))


def apply_by_triton(weights: list[Tensor], moves: list[Move], outs: list[Tensor]) -> bool:
    """Many parameters on a GPU, each in one pass, with one launch per form of move; False if Triton turns out not to work."""
    return triton_move.run_moves(
        [
            triton_move.TritonMove(weight, out, tuple(_for_triton(term) for term in move.terms), 1.0 - move.keep)
            for weight, move, out in zip(weights, moves, outs, strict=True)
        ]
    )


def _for_triton(term: Term) -> triton_move.TritonTerm:
    return triton_move.TritonTerm(term.value, term.scale, term.root, 1.0 / term.root_divisor, term.eps)


class MoveBatch:
    """Applies moves as they are added; collects those that can share a launch. Call `flush` at the end."""

    def __init__(self, mode: ApplyMode = "auto") -> None:
        self._mode = mode
        self._signature: tuple[object, ...] | None = None
        self._elements = 0
        self._block: list[tuple[Tensor, Move, Tensor]] = []

    def add(self, weight: Tensor, move: Move, out: Tensor) -> None:
        """Write ``W_hat`` of one parameter into `out`, now or at the next flush."""
        mode = _mode_for(weight, move, out, self._mode)
        if mode in ("plain", "in_place"):
            write: Callable[[Tensor, Move, Tensor], None] = apply_plain if mode == "plain" else apply_in_place
            write(weight, move, out)
            return
        # The kernels take any mix of moves; foreach needs moves of one form.
        signature = (mode,) if mode in ("kernel", "triton") else _signature(weight, move)
        if signature != self._signature or self._elements >= (TRITON_ELEMENTS if mode == "triton" else BLOCK_ELEMENTS):
            self.flush()
            self._signature = signature
        self._block.append((weight, move, out))
        self._elements += weight.numel()

    def flush(self) -> None:
        """Write the predictions that are still collected."""
        block, signature = self._block, self._signature
        # Emptied first: the retry at the end adds to the batch again.
        self._block, self._elements, self._signature = [], 0, None
        if not block:
            return
        weights, moves, outs = (list(column) for column in zip(*block, strict=True))
        if signature == ("kernel",):
            apply_by_kernel(weights, moves, outs)
        elif signature != ("triton",):
            apply_foreach(weights, moves, outs)
        elif not apply_by_triton(weights, moves, outs):
            for one in block:  # by another mode, now that Triton is known not to work
                self.add(*one)
            self.flush()


def _mode_for(weight: Tensor, move: Move, out: Tensor, wanted: ApplyMode) -> ApplyMode:
    # Best first; what a mode cannot do falls through to the next, down to "plain", which can do everything.
    if wanted in ("auto", "kernel") and _kernel_can(weight, move, out):
        return "kernel"
    if wanted in ("auto", "triton") and _triton_can(weight, move, out, wanted):
        return "triton"
    if wanted == "plain" or not _can_write_directly(weight, move, out):
        return "plain"
    if wanted in ("auto", "kernel", "triton"):
        wanted = "in_place" if weight.device.type == "cpu" else "foreach"
    return "in_place" if wanted == "foreach" and not _all_numbers(move) else wanted


def _kernel_can(weight: Tensor, move: Move, out: Tensor) -> bool:
    return share_flat_index([weight, out, *_operands(move)]) and _all_numbers(move) and available()


def _triton_can(weight: Tensor, move: Move, out: Tensor, wanted: ApplyMode) -> bool:
    maybe = weight.is_cuda or wanted == "triton"  # on a CPU Triton only interprets, for tests
    return maybe and triton_move.can(weight, out, _operands(move), [s for s in _scalars(move) if isinstance(s, Tensor)])


def _operands(move: Move) -> list[Tensor]:
    return [*(t.value for t in move.terms), *(t.root for t in move.terms if t.root is not None)]


def _can_write_directly(weight: Tensor, move: Move, out: Tensor) -> bool:
    """Whether kernels may write straight into `out`: equal shape, dtype and device, and plain torch tensors."""
    tensors = [out, *_operands(move)]
    return all(
        type(t) in (Tensor, torch.nn.Parameter)
        and t.dtype == weight.dtype
        and t.device == weight.device
        and t.shape == weight.shape
        for t in tensors
    )


def _all_numbers(move: Move) -> bool:
    return not any(isinstance(s, Tensor) for s in _scalars(move))


def _scalars(move: Move) -> list[Scalar]:
    return [move.keep, *(s for term in move.terms for s in (term.scale, term.root_divisor, term.eps))]


def _signature(weight: Tensor, move: Move) -> tuple[object, ...]:
    """What moves must share to be one block: foreach takes one `alpha` and one factor for the whole list."""
    pattern = tuple("root" if term.root is not None else term.scale for term in move.terms)
    return (weight.device, weight.dtype, move.keep, pattern)


def _is_one(value: Scalar) -> bool:
    return not isinstance(value, Tensor) and value == 1.0


def _number(value: Scalar) -> float:
    assert not isinstance(value, Tensor)
    return value
