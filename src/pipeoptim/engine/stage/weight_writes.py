"""Modules that write into their own weights in a forward, such as ``nn.Embedding(max_norm=)``: found by autograd's version counters.

On the latest weights such a write stays, as without a pipeline. Where forwards run on a copy, it would be gone with the copy, so
it is refused in the first forward, before a weight has moved. Writes that no counter sees (through ``.data`` or NumPy) are found by
their effect: in forwards 0, 1, 2, 4, 8 and so on, checksums of the weights are compared as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeoptim.errors import ConfigError
from pipeoptim.methods import Method
from pipeoptim.schedule import Program
from pipeoptim.weights import Latest

_version = attrgetter("_version")


def versions_of(params: Sequence[Tensor]) -> list[int]:
    """How often autograd has seen each of ``params`` written into; a loop in C, 40 ns for each."""
    return list(map(_version, params))


class Before(NamedTuple):
    """What is known of the weights before a forward: their versions, and their checksums where those are compared as well."""

    versions: list[int]
    sums: list[int] | None


class WeightWrites:
    """Of stage ``k``.

    Args:
        module: the stage's.
        params: its weights that the optimizer moves.
        method, program: say on which weights forwards run.
        elsewhere: weights of which something outside the module holds another copy, by what that is called.

    Attributes:
        possible: whether a forward has written, or none has run yet. Backwards must then not look at version counters.
    """

    def __init__(
        self,
        module: nn.Module,
        params: Sequence[Tensor],
        method: Method,
        program: Program,
        k: int,
        elsewhere: dict[Tensor, str],
    ) -> None:
        self.module, self.params, self.method, self.program, self.k = module, params, method, program, k
        self.elsewhere = elsewhere
        self.possible = True
        self._found = False
        self._forwards = 0

    def before(self) -> Before:
        """Before a forward, whose weights are in the module, for :meth:`check` after it."""
        # Forwards 0, 1, 2, 4, 8, ...: twenty passes over the weights in a million. Often the first of a mini-batch, whose weights no
        # other forward has written into yet: writing the same again changes nothing.
        compared = self._forwards & (self._forwards - 1) == 0
        self._forwards += 1
        return Before(versions_of(self.params), _checksums(self.params) if compared else None)

    def check(self, before: Before) -> None:
        """After a forward, whose weights are still in the module.

        Raises:
            ConfigError: it has written where the write would be lost.
        """
        # One comparison of lists per forward: the names are looked up only when something was written.
        after = versions_of(self.params)
        if after == before.versions:
            # The first forward decides that there are none; one that writes later is still found, and sets it again.
            self.possible = self.possible and self._found
        else:
            self._found = self.possible = True
            self._check_weights(before.versions, after)
        if before.sums is not None:
            self._check_weights(before.sums, _checksums(self.params))

    def _check_weights(self, before: list[int], after: list[int]) -> None:
        for p, old, new in zip(self.params, before, after, strict=True):
            if new != old:
                self._check_weight(p)

    def _check_weight(self, p: Tensor) -> None:
        name, owner = next(
            (f"{path}.{own}".lstrip("."), module)
            for path, module in self.module.named_modules()
            for own, q in module.named_parameters(recurse=False)
            if q is p
        )
        told = f"a forward of stage {self.k} writes into the weight {name!r} ({type(owner).__name__})"
        if p in self.elsewhere:
            raise ConfigError(
                f"{told}, of which {self.elsewhere[p]} would keep the old values; write after each update instead, with on_update=, into "
                "all of them"
            )
        if self._copies():
            raise ConfigError(
                f"{told}, but method {self.method.name!r} runs forwards on copies of the weights there, so the write would be lost; "
                "write after each update instead, with on_update=, or choose a method whose forwards run on the latest weights, such as "
                "'pipedream' or '1f1b'"
            )

    def _copies(self) -> bool:
        """Whether any forward of this stage runs on other weights than the latest."""
        source, program = self.method.forward, self.program
        if source.predicts:
            coming = range(2 * program.warm_up * program.microbatches)  # beyond the warm-up
            return any(source.steps_ahead(program, self.k, i) for i in coming)
        return type(source) is not Latest


@torch.no_grad()
def _checksums(weights: Sequence[Tensor]) -> list[int]:
    """One number per tensor that depends on its bits; without a copy, for there may be no room for one."""
    sums = [_checksum(p.detach()) for p in weights]
    return [0 if found is None else int(found.view(torch.int64)) for found in sums]  # read when all are on their way


def _checksum(tensor: Tensor) -> Tensor | None:
    """None where there are no values, or the device has no kernel for it: such a write is then not found."""
    try:
        return None if tensor.is_meta or not tensor.numel() else torch.hash_tensor(_as_hashable(tensor))
    except NotImplementedError:
        return None


def _as_hashable(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        return torch.view_as_real(tensor)
    # Types that nothing can be computed with, such as those of 8 bits.
    return tensor if tensor.is_floating_point() and tensor.element_size() > 1 else tensor.view(torch.uint8)
