"""What a stage gives to whatever clips its gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from pipeoptim.engine.processes.exchange import NormExchange
from pipeoptim.schedule import Program


@dataclass(frozen=True)
class ClippedStage:
    """A stage as its clipper sees it.

    Attributes:
        params: what the optimizer moves.
        program: of the pipeline.
        norms: the exchange with the other stages; None where the rule exchanges none.
        whole: maps the norms of ``params`` to those of the stage's tensors, of which this process may hold a shard only.
        elsewhere: those of ``params`` whose gradient another stage counts in the norm over all stages.
    """

    params: Sequence[Tensor]
    program: Program
    norms: NormExchange | None = None
    whole: Callable[[Tensor], Tensor] = lambda norms: norms
    elsewhere: Sequence[Tensor] = ()


__all__ = ["ClippedStage"]
