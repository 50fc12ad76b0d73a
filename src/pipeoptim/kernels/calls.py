"""The kernels as Python functions: jobs as plain data, packed and run in one call each."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pipeoptim.kernels import layout
from pipeoptim.kernels.library import library

STREAM_FROM = 1 << 21
"""Elements written per call from which on they bypass the caches: fewer may still be there when a forward reads them."""


class Term(NamedTuple):
    """``scale * value / (sqrt(root) * inverse + eps)``, or ``scale * value`` without root."""

    value: Tensor
    scale: float
    root: Tensor | None = None
    inverse: float = 1.0
    eps: float = 0.0


class Move(NamedTuple):
    """``out = w - lose * w - sum(terms)``."""

    w: Tensor
    out: Tensor
    terms: tuple[Term, ...] = ()
    lose: float = 0.0


@dataclass(frozen=True)
class Ahead:
    """What to predict right after the step: ``w' - lose w' - sum(...)``, or ``w' + steps (w' - w)`` by displacement.

    `factors`: for Adam, pairs (scale, inverse) of one term each, all with ``value = m``, ``root = v`` and the eps of the step;
    for SGD one pair, of the gradient and of the buffer.
    """

    lose: float = 0.0
    factors: tuple[tuple[float, float], ...] = ()
    steps: float | None = None


@dataclass(frozen=True)
class AdamHow:
    """``g = sign g + coupled w``, ``m = b1 m + (1-b1) g``, ``v = b2 v + gain g^2``,
    ``w = w - decay w - rate m / (sqrt(v) inverse + eps)``; without m, g in its place. `gain`: 1 - b2 unless given.
    """

    b1: float
    b2: float
    rate: float
    inverse: float
    eps: float
    sign: float = 1.0
    coupled: float = 0.0
    decay: float = 0.0
    ahead: Ahead | None = None
    gain: float | None = None

    @property
    def form(self) -> int:
        """The branch of the kernel."""
        if self.ahead is None:
            return layout.NO_PREDICTION
        if self.ahead.steps is not None:
            return layout.BY_DISPLACEMENT
        factors = self.ahead.factors
        return layout.BY_RULE if len(factors) == 1 and factors[0][1] == self.inverse else layout.BY_TERMS

    def tail(self, streamed: int) -> bytes:
        """What all jobs with this recipe share."""
        a = self.ahead or Ahead()
        scale, count = (a.factors[0][0] if a.factors else 0.0), (len(a.factors) if self.form == layout.BY_TERMS else 0)
        return layout.ADAM_TAIL.pack(
            self.form, streamed, count, 0,
            self.sign, self.coupled, self.b1, 1.0 - self.b1, self.b2, 1.0 - self.b2 if self.gain is None else self.gain,
            self.decay, self.rate, self.inverse, self.eps,
            a.lose, scale, a.steps or 0.0, 0.0,
        )  # fmt: skip


@dataclass(frozen=True)
class SgdHow:
    """``d = sign g + coupled w``, ``b = mu b + damp d``, ``w = w - lr (along[0] d + along[1] b)``; without b, ``w - lr d``."""

    lr: float
    mu: float = 0.0
    damp: float = 1.0
    along: tuple[float, float] = (0.0, 1.0)
    sign: float = 1.0
    coupled: float = 0.0
    ahead: Ahead | None = None

    def tail(self, streamed: int) -> bytes:
        """What all jobs with this recipe share."""
        a = self.ahead or Ahead()
        form: int = layout.NO_PREDICTION
        if self.ahead is not None:
            form = layout.BY_RULE if a.steps is None else layout.BY_DISPLACEMENT
        return layout.SGD_TAIL.pack(
            form, streamed,
            self.sign, self.coupled, self.mu, self.damp, *self.along, self.lr,
            a.lose, *(a.factors[0] if a.factors else (0.0, 0.0)), a.steps or 0.0, 0.0,
        )  # fmt: skip


class Adam(NamedTuple):
    """The step of one parameter; `out` takes the prediction."""

    how: AdamHow
    w: Tensor
    g: Tensor
    m: Tensor | None
    v: Tensor
    out: Tensor | None = None


class Sgd(NamedTuple):
    """The step of one parameter; `out` takes the prediction."""

    how: SgdHow
    w: Tensor
    g: Tensor
    b: Tensor | None = None
    out: Tensor | None = None


def run_adam(jobs: Sequence[Adam]) -> None:
    """Carry out all steps, in place, with the predictions that go with them."""
    streamed = _streamed([job.out for job in jobs])
    recipes: dict[int, tuple[bytes, int]] = {}
    kept = []  # memory that recipes point into
    packed = []
    for how, w, g, m, v, out in jobs:
        if id(how) not in recipes:
            table = _memory([layout.FACTOR.pack(*pair) for pair in how.ahead.factors] if how.ahead is not None else [])
            kept.append(table)
            recipes[id(how)] = how.tail(streamed), ctypes.addressof(table)
        tail, factors = recipes[id(how)]
        moments = 0 if m is None else m.data_ptr(), v.data_ptr()
        addresses = w.data_ptr(), g.data_ptr(), *moments, 0 if out is None else out.data_ptr()
        packed.append(layout.ADAM_HEAD.pack(w.numel(), *addresses, factors))
        packed.append(tail)
    _run("adam", len(jobs), packed)


def run_sgd(jobs: Sequence[Sgd]) -> None:
    """Carry out all steps, in place, with the predictions that go with them."""
    streamed = _streamed([job.out for job in jobs])
    tails: dict[int, bytes] = {}
    packed = []
    for how, w, g, b, out in jobs:
        if id(how) not in tails:
            tails[id(how)] = how.tail(streamed)
        addresses = w.data_ptr(), g.data_ptr(), 0 if b is None else b.data_ptr(), 0 if out is None else out.data_ptr()
        packed.append(layout.SGD_HEAD.pack(w.numel(), *addresses))
        packed.append(tails[id(how)])
    _run("sgd", len(jobs), packed)


def run_moves(jobs: Sequence[Move]) -> None:
    """Write all predictions."""
    streamed = _streamed([job.out for job in jobs])
    terms = [
        layout.TERM.pack(value.data_ptr(), 0 if root is None else root.data_ptr(), scale, inverse, eps, 0.0)
        for job in jobs
        for value, scale, root, inverse, eps in job.terms
    ]
    table = _memory(terms)
    address = ctypes.addressof(table)
    packed = []
    for w, out, own, lose in jobs:
        packed.append(layout.MOVE.pack(w.numel(), w.data_ptr(), out.data_ptr(), address, len(own), streamed, lose, 0.0))
        address += len(own) * layout.TERM.size
    _run("move", len(jobs), packed)


def copy(sources: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
    """Copy; large tensors past the caches, in two passes over memory instead of the three of an ordinary copy."""
    run_moves([Move(source, out) for source, out in zip(sources, outs, strict=True)])


def _run(name: Literal["adam", "sgd", "move"], count: int, packed: list[bytes]) -> None:
    if count and getattr(library(), f"pipeoptim_{name}")(count, b"".join(packed), torch.get_num_threads()):
        raise MemoryError(f"no memory for a list of {count} jobs")


def _streamed(outs: Sequence[Tensor | None]) -> int:
    return int(sum(out.numel() for out in outs if out is not None) >= STREAM_FROM)


def _memory(rows: list[bytes]) -> ctypes.Array[ctypes.c_char]:
    """Rows one after the other, at an address that stays."""
    data = b"".join(rows)
    return ctypes.create_string_buffer(data, len(data) + 1)
