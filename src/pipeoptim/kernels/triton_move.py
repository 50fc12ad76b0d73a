"""Predictions on a GPU by the kernel of `triton_source`: its tables, its launches, and whether Triton is available.

Triton comes with torch's builds for GPUs and is imported at the first prediction of a tensor on a GPU. The addresses of weights, states
and buffers do not change from mini-batch to mini-batch, so their tables stay on the device; only the numbers of the formula are sent
each time, from pinned memory, without a synchronization.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeoptim.kernels.library import switched_off, tell_without
from pipeoptim.kernels.tensor_layout import share_memory_order

BLOCK = 1024
"""Elements per program: 8 per thread, two vectors of float32 from each stream; not tuned on a GPU."""

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
"""Of the compiler: 128 threads per program; sums are rounded as torch rounds them."""

TYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 16
"""Bytes of the widest load; a parameter at an address that is no multiple of it is read element by element."""

_failed: list[str] = []

Number = float | Tensor


class TritonTerm(NamedTuple):
    """As `calls.KernelTerm`; its numbers may be 0-dim tensors on the device, which are never read on the host."""

    value: Tensor
    scale: Number
    root: Tensor | None = None
    inverse: Number = 1.0
    eps: Number = 0.0


class TritonMove(NamedTuple):
    """As `calls.KernelMove` with such terms; `out` and operands may have another type than `w`."""

    w: Tensor
    out: Tensor
    terms: tuple[TritonTerm, ...] = ()
    lose: Number = 0.0


class Form(NamedTuple):
    """What all parameters of a launch have in common: the device, and the constants that the kernel is compiled for."""

    device: torch.device
    types: tuple[torch.dtype, torch.dtype, torch.dtype]
    terms: int
    shared: bool
    roots: int
    align: int


def can(weight: Tensor, out: Tensor, operands: Sequence[Tensor], scalars: Sequence[Tensor] = ()) -> bool:
    """Whether the kernel can take this parameter: on a GPU, of supported types, all tensors in the same memory order.

    `scalars`: those numbers of the formula that are tensors.
    """
    if not (weight.is_cuda or (weight.is_cpu and interpreted())):
        return False
    kinds = {t.dtype for t in operands}
    return (
        len(kinds) <= 1
        and {weight.dtype, out.dtype, *kinds} <= set(TYPES)
        and all(t.device == weight.device for t in (out, *operands, *scalars))
        and all(t.dim() == 0 for t in scalars)
        and share_memory_order([weight, out, *operands])
        and available()
        and not (weight.is_cuda and torch.cuda.is_current_stream_capturing())  # a graph would read tables that are gone
    )


def available() -> bool:
    """Whether Triton works, as far as is known; the first call imports it."""
    return not _failed and _kernel() is not None


def interpreted() -> bool:
    """Whether Triton interprets kernels instead of compiling them (``TRITON_INTERPRET=1``), which it can do on a CPU."""
    return type(_kernel()).__name__ == "InterpretedFunction"


@cache
def _kernel() -> Any:
    if switched_off():
        return None
    try:
        from pipeoptim.kernels import triton_source
    except Exception as error:  # not installed, or one that cannot be loaded here
        _give_up(error)
        return None
    return triton_source.move


def _give_up(error: Exception) -> None:
    if not _failed:
        _failed.append(f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0]}")
        tell_without("Triton kernel", _failed[0], "install the triton that this torch names, and a C compiler")


def run_moves(jobs: Sequence[TritonMove]) -> bool:
    """Write all predictions, one launch per form. The kernel `can` take every job.

    False if Triton fails to compile the kernel: the buffers are undefined then, and Triton is no longer `available`.
    """
    forms: dict[Form, tuple[list[TritonMove], list[int]]] = {}
    for job in jobs:
        form, row = _form(job)
        own, places = forms.setdefault(form, ([], []))
        own.append(job)
        places += row
    return all(_launch(form, own, places) for form, (own, places) in forms.items())


def _form(job: TritonMove) -> tuple[Form, list[int]]:
    """The form, and the row of the table of places: size, addresses of w, out, and value and root of each operand."""
    w, out, terms, _ = job
    # "decayed" has s terms of the same m and v, which are then read once.
    shared = len(terms) > 1 and all(t.value is terms[0].value and t.root is terms[0].root for t in terms)
    row, roots, bits = [w.numel(), w.data_ptr(), out.data_ptr()], 0, w.data_ptr() | out.data_ptr()
    for n, (value, _, root, _, _) in enumerate(terms[:1] if shared else terms):
        at, root_at = value.data_ptr(), 0 if root is None else root.data_ptr()
        row += (at, root_at)
        bits |= at | root_at
        roots |= (root is not None) << n
    types = (w.dtype, terms[0].value.dtype if terms else w.dtype, out.dtype)
    return Form(w.device, types, len(terms), shared, roots, 1 if bits % WIDEST else WIDEST), row


def _launch(form: Form, jobs: Sequence[TritonMove], places: Sequence[int]) -> bool:
    with torch.cuda.device(form.device) if form.device.type == "cuda" else nullcontext():
        return _launch_here(form, jobs, places)


def _launch_here(form: Form, jobs: Sequence[TritonMove], places: Sequence[int]) -> bool:
    where = (form.device, torch.cuda.current_stream().cuda_stream if form.device.type == "cuda" else 0)
    blocks = _blocks(tuple(job.w.numel() for job in jobs), BLOCK, *where)
    # Nothing but empty parameters.
    if not len(blocks):
        return True
    table = _places(tuple(places), *where)
    numbers = [number for job in jobs for number in (job.lose, *(x for t in job.terms for x in (t.scale, t.inverse, t.eps)))]
    sent = _send_numbers(numbers, *where)
    try:
        _kernel()[(len(blocks),)](table, sent, blocks, form.terms, **constants(form), **OPTIONS)
    except torch.AcceleratorError:  # an error of the device, which any other path would meet as well
        raise
    except Exception as error:  # the compiler raises many types
        _give_up(error)
        return False
    return True


def _send_numbers(numbers: Sequence[Number], device: torch.device, stream: int) -> Tensor:
    """The numbers as one tensor on the device, where some of them may lie already."""
    there = {n: number.to(torch.float32) for n, number in enumerate(numbers) if isinstance(number, Tensor)}
    sent = _on(device, torch.tensor([0.0 if n in there else number for n, number in enumerate(numbers)], dtype=torch.float32))
    if there:
        sent.index_copy_(0, _places(tuple(there), device, stream), torch.stack(list(there.values())))
    return sent


def constants(form: Form) -> dict[str, Any]:
    """What the kernel is compiled for."""
    import triton.language as tl

    names = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    types = {key: names[dtype] for key, dtype in zip(("WEIGHT", "OPERAND", "OUT"), form.types, strict=True)}
    own = 1 if form.shared else form.terms
    return {"SHARED": form.shared, "OWN": own, "ROOTS": form.roots, "ALIGN": form.align, "BLOCK": BLOCK, **types}


# Tables are pure functions of their arguments, so a cached one is never stale. `stream` is an argument because a table may be read, and its
# memory be reused, only in the order of the stream that it was sent on.


@lru_cache(maxsize=256)
def _places(numbers: tuple[int, ...], device: torch.device, stream: int) -> Tensor:  # noqa: ARG001
    return _on(device, torch.tensor(numbers, dtype=torch.int64))


@lru_cache(maxsize=64)
def _blocks(sizes: tuple[int, ...], block: int, device: torch.device, stream: int) -> Tensor:  # noqa: ARG001
    """(parameter, which of its blocks) of every program."""
    counts = (torch.tensor(sizes) + block - 1) // block
    owner = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return _on(device, torch.stack([owner, torch.arange(len(owner)) - first], dim=1).to(torch.int32))


def _on(device: torch.device, table: Tensor) -> Tensor:
    return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)
