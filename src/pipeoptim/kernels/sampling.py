"""Small samples of many tensors. Calls and cache misses are what they cost, so one call takes them all, prefetching ahead."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import accumulate, pairwise
from struct import Struct

import torch
from torch import Tensor

from pipeoptim.kernels.library import available, library


class TensorSampler:
    """``torch.cat([tensors[n].take(where) for n, where in places])`` of contiguous float32 tensors on the CPU.

    Args:
        groups: what is sampled of each group of tensors: the number of a tensor, and which of its elements (int64, on the CPU).
    """

    def __init__(self, groups: Sequence[Sequence[tuple[int, Tensor]]]) -> None:
        places = [place for group in groups for place in group]
        sizes = [where.numel() for _, where in places]
        self.size = sum(sizes)
        self._runs = [_runs(where) for _, where in places]  # kept alive: the kernel reads them by address
        # Bytes: 4 per float32.
        begins = [4 * begin for begin in accumulate([0, *sizes[:-1]])]
        runs = [(table.data_ptr(), table.shape[0]) for table in self._runs]
        self._fixed = [(n, *run, begin) for (n, _), run, begin in zip(places, runs, begins, strict=False)]
        # Four numbers per tensor: address, runs, destination, number of runs.
        self._jobs = Struct(f"@{4 * len(places)}q")
        ends = list(accumulate(sum(where.numel() for _, where in group) for group in groups))
        self._ends = (ctypes.c_int64 * len(ends))(*ends)
        self._sums = (ctypes.c_double * (3 * len(ends)))()

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor | None:
        """The elements, one after the other; None if there is no kernel for these tensors."""
        if not available():
            return None
        out = torch.empty(self.size)  # new each time: the caller keeps samples for comparison
        start = out.data_ptr()
        jobs: list[int] = []
        for n, runs, count, begin in self._fixed:
            tensor = tensors[n]
            if tensor.dtype is not torch.float32 or not tensor.is_cpu or not tensor.is_contiguous():
                return None
            jobs += (tensor.data_ptr(), runs, start + begin, count)
        library().take(len(self._fixed), self._jobs.pack(*jobs))
        return out

    def products(self, before: Tensor, predicted: Tensor, now: Tensor) -> list[list[float]]:
        """For each group ``[a.a, a.b, b.b]`` with ``a = predicted - before``, ``b = now - before``, of three samples taken so."""
        addresses = before.data_ptr(), predicted.data_ptr(), now.data_ptr()
        library().products(*addresses, len(self._ends), self._ends, self._sums)
        return [self._sums[i : i + 3] for i in range(0, len(self._sums), 3)]


def _runs(where: Tensor) -> Tensor:
    """(start, length) of each run of consecutive indices in ``where``: a run is copied at once."""
    breaks = [0, *(1 + (where[1:] != where[:-1] + 1).nonzero().flatten()).tolist(), where.numel()]
    return torch.tensor([[int(where[a]), b - a] for a, b in pairwise(breaks) if b > a]).reshape(-1, 2)
