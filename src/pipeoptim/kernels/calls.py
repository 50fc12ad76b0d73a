"""The kernels as Python functions and objects: jobs as plain data, packed and run in one call each."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import NamedTuple

import torch
from torch import Tensor

from pipeoptim.kernels import layout
from pipeoptim.kernels.library import library

STREAM_FROM = 1 << 21
"""Elements written per call from which on they bypass the caches: fewer may still be there when a forward reads them."""


class KernelTerm(NamedTuple):
    """``scale * value / (sqrt(root) * inverse + eps)``, or ``scale * value`` without root."""

    value: Tensor
    scale: float
    root: Tensor | None = None
    inverse: float = 1.0
    eps: float = 0.0


class KernelMove(NamedTuple):
    """``out = w - lose * w - sum(terms)``."""

    w: Tensor
    out: Tensor
    terms: tuple[KernelTerm, ...] = ()
    lose: float = 0.0


@dataclass(frozen=True)
class KernelPrediction:
    """What to predict right after the step: ``w' - lose w' - sum(...)``, or ``w' + steps (w' - w)`` by displacement.

    `factors`: for AdamTensors, pairs (scale, inverse) of one term each, all with ``value = m``, ``root = v`` and the eps of the step;
    for SGD one pair, of the gradient and of the buffer.
    """

    lose: float = 0.0
    factors: tuple[tuple[float, float], ...] = ()
    steps: float | None = None


@dataclass(frozen=True)
class AdamCoefficients:
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
    prediction: KernelPrediction | None = None
    gain: float | None = None

    @property
    def form(self) -> int:
        """The branch of the kernel."""
        if self.prediction is None:
            return layout.NO_PREDICTION
        if self.prediction.steps is not None:
            return layout.BY_DISPLACEMENT
        factors = self.prediction.factors
        return layout.BY_RULE if len(factors) == 1 and factors[0][1] == self.inverse else layout.BY_TERMS

    def packed(self, into: int, factors: int) -> bytes:
        """For the kernel; `into`: how the prediction is written, `factors`: address of the packed factors."""
        a = self.prediction or KernelPrediction()
        scale, count = (a.factors[0][0] if a.factors else 0.0), (len(a.factors) if self.form == layout.BY_TERMS else 0)
        return layout.ADAM_HOW.pack(
            factors, self.form, into, count, 0,
            self.sign, self.coupled, self.b1, 1.0 - self.b1, self.b2, 1.0 - self.b2 if self.gain is None else self.gain,
            self.decay, self.rate, self.inverse, self.eps,
            a.lose, scale, a.steps or 0.0, 0.0,
        )  # fmt: skip


@dataclass(frozen=True)
class SgdCoefficients:
    """``d = sign g + coupled w``, ``b = mu b + damp d``, ``w = w - lr (along[0] d + along[1] b)``; without b, ``w - lr d``."""

    lr: float
    mu: float = 0.0
    damp: float = 1.0
    along: tuple[float, float] = (0.0, 1.0)
    sign: float = 1.0
    coupled: float = 0.0
    prediction: KernelPrediction | None = None

    def packed(self, into: int, factors: int) -> bytes:
        """For the kernel, which needs no table of factors."""
        a = self.prediction or KernelPrediction()
        form: int = layout.NO_PREDICTION
        if self.prediction is not None:
            form = layout.BY_RULE if a.steps is None else layout.BY_DISPLACEMENT
        return layout.SGD_HOW.pack(
            form, into,
            self.sign, self.coupled, self.mu, self.damp, *self.along, self.lr,
            a.lose, *(a.factors[0] if a.factors else (0.0, 0.0)), a.steps or 0.0, 0.0,
        )  # fmt: skip


class AdamTensors(NamedTuple):
    """Where one parameter of an Adam step lies; `out` takes the prediction."""

    w: Tensor
    m: Tensor | None
    v: Tensor
    out: Tensor | None = None


class SgdTensors(NamedTuple):
    """Where one parameter of an SGD step lies; `out` takes the prediction."""

    w: Tensor
    b: Tensor | None = None
    out: Tensor | None = None


class MultiTensorStep:
    """Steps of several parameters by one call, again and again: what stays from step to step is packed once.

    Args:
        places: of one kind. Their tensors must be kept alive, and stay where they are, as long as this is run.
        over_gradients: write the predictions over the gradients, not into what `out` names.
    """

    def __init__(self, places: Sequence[AdamTensors] | Sequence[SgdTensors], over_gradients: bool = False) -> None:
        self._entry, pack = ("adam", layout.ADAM_PLACE) if isinstance(places[0], AdamTensors) else ("sgd", layout.SGD_PLACE)
        self._into = layout.OVER_GRADIENT if over_gradients else _into([place.out for place in places])
        self._count = len(places)
        self._places = b"".join(pack.pack(place.w.numel(), *map(_address, place)) for place in places)
        self._pack_grads, self._pack_which = Struct(f"@{self._count}P"), Struct(f"@{self._count}i")

    def run(
        self, grads: Iterable[int], which: Sequence[int], hows: Sequence[AdamCoefficients] | Sequence[SgdCoefficients]
    ) -> None:
        """Carry out all steps, in place, with the predictions that go with them.

        Args:
            grads: addresses of the gradients.
            which: of each parameter the number of its recipe.
            hows: the recipes.
        """
        tables = [_factors(how) for how in hows]  # memory that recipes point into
        packed = b"".join([hows[n].packed(self._into, ctypes.addressof(table)) for n, table in enumerate(tables)])
        entry = getattr(library(), self._entry)
        jobs = self._count, self._places, self._pack_grads.pack(*grads), self._pack_which.pack(*which)
        _done(entry(*jobs, packed, torch.get_num_threads()), self._count)


class StepCounters:
    """The step counts that torch keeps for parameters: float32, one number each, on the CPU; None where there is none."""

    def __init__(self, steps: Sequence[Tensor | None]) -> None:
        self._addresses = Struct(f"@{len(steps)}P").pack(*map(_address, steps))
        self._now = (ctypes.c_float * len(steps))()

    def add(self, by: float) -> list[float]:
        """Add to each, and say what they are now: 0 where there is none."""
        library().count(len(self._now), self._addresses, by, self._now)
        return self._now[:]


class CachePrefetch:
    """Brings what Python looks at for tensors and other objects into the caches, all of it at once.

    After a backward has gone through other memory, a look at a hundred tensors waits for memory several times per tensor, one wait
    after the other: longer than the look itself. An object that is gone by then, or was given another place, does no harm.
    """

    def __init__(self, objects: Iterable[object]) -> None:
        lines: list[int] = []
        for one in objects:
            lines += _lines(id(one) - _HEAD, 2)
            if isinstance(one, Tensor):
                lines += _lines(one._cdata, 4)  # type: ignore[attr-defined]  # sizes, strides, storage
                lines += _lines(one.untyped_storage()._cdata, 2)  # where it lies
        self._count, self._lines = len(lines), Struct(f"@{len(lines)}P").pack(*lines)

    def __call__(self) -> None:
        library().fetch(self._count, self._lines)


_LINE, _HEAD = 64, 16  # bytes of a cache line; what the garbage collector has before an object


def _lines(address: int, count: int) -> list[int]:
    return [address + _LINE * n for n in range(count)]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _factors(how: AdamCoefficients | SgdCoefficients) -> ctypes.Array[ctypes.c_char]:
    return _memory([layout.FACTOR.pack(*pair) for pair in how.prediction.factors] if how.prediction is not None else [])


def run_moves(jobs: Sequence[KernelMove]) -> None:
    """Write all predictions."""
    into = _into([job.out for job in jobs])
    terms = [
        layout.TERM.pack(value.data_ptr(), 0 if root is None else root.data_ptr(), scale, inverse, eps, 0.0)
        for job in jobs
        for value, scale, root, inverse, eps in job.terms
    ]
    table = _memory(terms)
    address = ctypes.addressof(table)
    packed = []
    for w, out, own, lose in jobs:
        packed.append(layout.MOVE.pack(w.numel(), w.data_ptr(), out.data_ptr(), address, len(own), into, lose, 0.0))
        address += len(own) * layout.TERM.size
    if jobs:
        _done(library().move(len(jobs), b"".join(packed), torch.get_num_threads()), len(jobs))


def copy_tensors(sources: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
    """Copy; large tensors past the caches, in two passes over memory instead of the three of an ordinary copy."""
    run_moves([KernelMove(source, out) for source, out in zip(sources, outs, strict=True)])


def _done(failed: int, count: int) -> None:
    if failed:
        raise MemoryError(f"no memory for a list of {count} jobs")


def _into(outs: Sequence[Tensor | None]) -> int:
    large = sum(out.numel() for out in outs if out is not None) >= STREAM_FROM
    return layout.STREAMED if large else layout.CACHED


def _memory(rows: list[bytes]) -> ctypes.Array[ctypes.c_char]:
    """Rows one after the other, at an address that stays."""
    data = b"".join(rows)
    return ctypes.create_string_buffer(data, len(data) + 1)
