"""The kernels as Python functions and objects: the arguments of many tensors are packed as plain data and run in one call.

A call through ctypes costs about as much as stepping a small tensor, so there is one call per step and not one per tensor. What stays
from step to step (sizes, addresses) is packed once; per step only gradients' addresses and coefficients are.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from struct import Struct
from types import CodeType
from typing import NamedTuple

import torch
from torch import Tensor

from pipeoptim.kernels import layout
from pipeoptim.kernels.library import library

STREAM_FROM = 1 << 21
"""Calls that write at least so many elements bypass the caches. Fewer may still be in a cache when the forward reads them; more would only
evict what is needed next, and an ordinary store reads each line before writing it.
"""


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


NO_PREDICTION = KernelPrediction()


class EstimateFactors(NamedTuple):
    """The gradient of a dry step: ``of_value * (what is given as gradient) + of_mean * (m or b) + of_weight * w``."""

    of_value: float = 1.0
    of_mean: float = 0.0
    of_weight: float = 0.0


NO_ESTIMATE = EstimateFactors()


@dataclass(frozen=True)
class AdamCoefficients:
    """Numbers of one step of Adam, shared by all parameters of a group at the same step count.

    ``g = sign g + coupled w``, ``m = b1 m + (1-b1) g``, ``v = b2 v + gain g^2``,
    ``w = w - decay w - rate m / (sqrt(v) inverse + eps)``; without m, g in its place. `gain`: 1 - b2 unless given.

    With `dry` nothing is stepped: the prediction is ``w - lose w - sum(...)`` of the moments that the step would make from that gradient.
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
    dry: EstimateFactors | None = None

    @property
    def form(self) -> int:
        """The branch of the kernel."""
        if self.prediction is None:
            return layout.NO_PREDICTION
        if self.prediction.steps is not None:
            return layout.BY_DISPLACEMENT
        factors = self.prediction.factors
        if self.dry is not None:
            assert len(factors) == 1 and factors[0][1] == self.inverse, "a dry step has the divisor of the step"
            return layout.DRY
        # The same divisor as the step's: the kernel reuses the quotient that it has just computed.
        return layout.BY_RULE if len(factors) == 1 and factors[0][1] == self.inverse else layout.BY_TERMS

    def packed(self, into: int, factors: int) -> bytes:
        """As the kernel reads it; `into`: where the prediction goes, `factors`: address of the packed factors."""
        a, form = self.prediction or NO_PREDICTION, self.form
        scale, count = (a.factors[0][0] if a.factors else 0.0), (len(a.factors) if form == layout.BY_TERMS else 0)
        return layout.ADAM_COEFFICIENTS.pack(
            factors, form, into, count, 0,
            self.sign, self.coupled, self.b1, 1.0 - self.b1, self.b2, 1.0 - self.b2 if self.gain is None else self.gain,
            self.decay, self.rate, self.inverse, self.eps,
            a.lose, scale, a.steps or 0.0, *(self.dry or NO_ESTIMATE),
        )  # fmt: skip


@dataclass(frozen=True)
class SgdCoefficients:
    """Numbers of one step of SGD, shared by all parameters of a group.

    ``d = sign g + coupled w``, ``b = mu b + damp d``, ``w = w - lr (along[0] d + along[1] b)``; without b, ``w - lr d``. `dry`: as in
    AdamCoefficients.
    """

    lr: float
    mu: float = 0.0
    damp: float = 1.0
    along: tuple[float, float] = (0.0, 1.0)
    sign: float = 1.0
    coupled: float = 0.0
    prediction: KernelPrediction | None = None
    dry: EstimateFactors | None = None

    @property
    def form(self) -> int:
        """The branch of the kernel."""
        if self.dry is not None:
            return layout.DRY
        if self.prediction is None:
            return layout.NO_PREDICTION
        return layout.BY_RULE if self.prediction.steps is None else layout.BY_DISPLACEMENT

    def packed(self, into: int, factors: int) -> bytes:
        """As the kernel reads it; it needs no table of factors."""
        a = self.prediction or NO_PREDICTION
        return layout.SGD_COEFFICIENTS.pack(
            self.form, into,
            self.sign, self.coupled, self.mu, self.damp, *self.along, self.lr,
            a.lose, *(a.factors[0] if a.factors else (0.0, 0.0)), a.steps or 0.0,
            *(self.dry or NO_ESTIMATE),
        )  # fmt: skip


class AdamTensors(NamedTuple):
    """The tensors of one parameter in an Adam step; `out` takes the prediction."""

    w: Tensor
    m: Tensor | None
    v: Tensor
    out: Tensor | None = None


class SgdTensors(NamedTuple):
    """The tensors of one parameter in an SGD step; `out` takes the prediction."""

    w: Tensor
    b: Tensor | None = None
    out: Tensor | None = None


class MultiTensorStep:
    """Steps several parameters in one call; what stays the same from step to step is packed once.

    Args:
        tensors: of each parameter, all of one kind. They must stay alive, and at their addresses, as long as this object is used.
        over_gradients: write the predictions over the gradients instead of into `out`.
    """

    def __init__(self, tensors: Sequence[AdamTensors] | Sequence[SgdTensors], over_gradients: bool = False) -> None:
        self._entry, pack = (
            ("adam", layout.ADAM_TENSORS) if isinstance(tensors[0], AdamTensors) else ("sgd", layout.SGD_TENSORS)
        )
        # Decided for all tensors together: together they either fit into the caches or do not.
        self._destination = layout.OVER_GRADIENT if over_gradients else _destination([one.out for one in tensors])
        self._count = len(tensors)
        self._tensors = b"".join(pack.pack(one.w.numel(), *map(_address_of, one)) for one in tensors)
        self._pack_grads, self._pack_sets = Struct(f"@{self._count}P"), Struct(f"@{self._count}i")

    def run(
        self, grads: Iterable[int], set_of: Sequence[int], sets: Sequence[AdamCoefficients] | Sequence[SgdCoefficients]
    ) -> None:
        """Step all parameters in place, and write their predictions.

        Args:
            grads: addresses of the gradients.
            set_of: for each parameter the number of its set of coefficients.
            sets: the coefficients.
        """
        tables = [_factor_table(one) for one in sets]  # kept alive until the call returns: the packed sets point into them
        addresses = [0 if table is None else ctypes.addressof(table) for table in tables]
        packed = b"".join([sets[n].packed(self._destination, address) for n, address in enumerate(addresses)])
        entry = getattr(library(), self._entry)
        jobs = self._jobs(grads, set_of)
        _check_memory(entry(*jobs, packed, torch.get_num_threads()), self._count)

    def dry(
        self, grads: Iterable[int], set_of: Sequence[int], sets: Sequence[AdamCoefficients] | Sequence[SgdCoefficients]
    ) -> DryStep:
        """As `run`, of sets with `dry`: ready to be carried out with any estimates."""
        # No table of factors: a dry step has one.
        packed = [one.packed(self._destination, 0) for one in sets]
        return DryStep(getattr(library(), self._entry), self._jobs(grads, set_of), packed)

    def _jobs(self, grads: Iterable[int], set_of: Sequence[int]) -> tuple[int, bytes, bytes, bytes]:
        return self._count, self._tensors, self._pack_grads.pack(*grads), self._pack_sets.pack(*set_of)


class DryStep:
    """A dry step of several parameters, packed once for estimates that change: each run writes only these into the packed sets.

    Args:
        entry: function of the library.
        jobs: its first arguments; what they point to must stay alive.
        sets: packed coefficients.
    """

    def __init__(self, entry: Callable[..., int], jobs: tuple[int, bytes, bytes, bytes], sets: Sequence[bytes]) -> None:
        self._count, tensors, *self._gradients = jobs
        self._entry, self._tensors = entry, ctypes.create_string_buffer(tensors, len(tensors))
        packed, size = b"".join(sets), len(sets[0])
        self._sets = ctypes.create_string_buffer(packed, len(packed))
        self._places = range(size - layout.DRY_ESTIMATE.size, len(packed), size)

    def write_into(self, outs: Sequence[int]) -> None:
        """From here on, write the predictions to these addresses."""
        size = len(self._tensors) // self._count
        for n, address in enumerate(outs, 1):  # the last field of each parameter
            layout.ADDRESS.pack_into(self._tensors, n * size - layout.ADDRESS.size, address)

    def run(self, estimates: Sequence[EstimateFactors]) -> None:
        """Write the predictions; `estimates`: of each set."""
        for place, factors in zip(self._places, estimates, strict=True):
            layout.DRY_ESTIMATE.pack_into(self._sets, place, *factors)
        failed = self._entry(self._count, self._tensors, *self._gradients, self._sets, torch.get_num_threads())
        _check_memory(failed, self._count)


class StepCounters:
    """The step counts that torch keeps for parameters: float32, one number each, on the CPU; None where there is none."""

    def __init__(self, steps: Sequence[Tensor | None]) -> None:
        self._addresses = Struct(f"@{len(steps)}P").pack(*map(_address_of, steps))
        # Reused by every call; `add` returns a copy.
        self._now = (ctypes.c_float * len(steps))()

    def add(self, by: float) -> list[float]:
        """Add to each; returns what they are now, 0 where there is none."""
        library().count(len(self._now), self._addresses, by, self._now)
        return self._now[:]


class CachePrefetch:
    """Prefetches into the caches what Python reads of tensors and other objects.

    A backward evicts them. Reading a hundred tensors then waits for memory several times per tensor, one wait after the other, which takes
    longer than the reading itself; prefetched, all waits overlap. Saved: 540 -> 400 us of Python for a fused step of AdamW over
    111 tensors with cold caches, together with the C loops of `rules.fused.plan`. A freed or moved object does no harm: a prefetch
    of any address is allowed.
    """

    def __init__(self, objects: Iterable[object]) -> None:
        lines: list[int] = []
        for one in objects:
            lines += _lines(id(one) - _HEAD, 2)
            if isinstance(one, CodeType):  # it holds its instructions
                lines += _lines(id(one), 1 + sys.getsizeof(one) // _LINE)
                lines += _lines(id(one.co_consts), 1 + sys.getsizeof(one.co_consts) // _LINE)
            elif isinstance(one, Tensor):
                lines += _lines(one._cdata, 4)  # type: ignore[attr-defined]  # sizes, strides, storage
                lines += _lines(one.untyped_storage()._cdata, 2)  # where it lies
        lines = list(dict.fromkeys(address // _LINE * _LINE for address in lines))
        self._count, self._lines = len(lines), Struct(f"@{len(lines)}P").pack(*lines)

    def __call__(self) -> None:
        library().fetch(self._count, self._lines)


_LINE, _HEAD = 64, 16  # bytes of a cache line; of the garbage collector's header before an object


def _lines(address: int, count: int) -> list[int]:
    return [address + _LINE * n for n in range(count)]


def _address_of(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _factor_table(one: AdamCoefficients | SgdCoefficients) -> ctypes.Array[ctypes.c_char] | None:
    """None where the kernel reads none: making one takes 15 us with cold caches."""
    if one.prediction is None or one.form != layout.BY_TERMS:
        return None
    return _packed_rows([layout.FACTOR.pack(*pair) for pair in one.prediction.factors])


class EstimateParts(NamedTuple):
    """Where the parts of a gradient to come lie: ``of_value * value + of_mean * mean + of_weight * w``."""

    elements: int
    value: int
    mean: int
    w: int
    factors: EstimateFactors


def norm_of_estimates(parts: Iterable[EstimateParts]) -> float:
    """The 2-norm of all gradients together, in float64: one pass over the parts whose factors are not 0."""
    packed = [layout.ESTIMATE.pack(*one[:4], *one.factors, 0.0) for one in parts]
    total = ctypes.c_double()
    _check_memory(library().squares(len(packed), b"".join(packed), ctypes.byref(total), torch.get_num_threads()), len(packed))
    return math.sqrt(total.value)


def run_moves(jobs: Sequence[KernelMove]) -> None:
    """Write all predictions."""
    into = _destination([job.out for job in jobs])
    terms = [
        layout.TERM.pack(value.data_ptr(), 0 if root is None else root.data_ptr(), scale, inverse, eps, 0.0)
        for job in jobs
        for value, scale, root, inverse, eps in job.terms
    ]
    # Referenced until this function returns: the packed jobs point into it.
    table = _packed_rows(terms)
    address = ctypes.addressof(table)
    packed = []
    for w, out, own, lose in jobs:
        packed.append(layout.MOVE.pack(w.numel(), w.data_ptr(), out.data_ptr(), address, len(own), into, lose, 0.0))
        # The terms of all jobs lie one after the other in `table`.
        address += len(own) * layout.TERM.size
    if jobs:
        _check_memory(library().move(len(jobs), b"".join(packed), torch.get_num_threads()), len(jobs))


def copy_tensors(sources: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
    """Copy; large tensors bypass the caches: two passes over memory instead of the three of an ordinary copy."""
    run_moves([KernelMove(source, out) for source, out in zip(sources, outs, strict=True)])


def _check_memory(failed: int, count: int) -> None:
    if failed:
        raise MemoryError(f"no memory for a list of {count} jobs")


def _destination(outs: Sequence[Tensor | None]) -> int:
    large = sum(out.numel() for out in outs if out is not None) >= STREAM_FROM
    return layout.STREAMED if large else layout.CACHED


def _packed_rows(rows: list[bytes]) -> ctypes.Array[ctypes.c_char]:
    """Rows one after the other, at a fixed address."""
    data = b"".join(rows)
    return ctypes.create_string_buffer(data, len(data) + 1)
