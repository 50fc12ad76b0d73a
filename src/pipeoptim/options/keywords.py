"""The keyword arguments of pipelines by the types in which users give them, for type checkers and signatures.

Written by ``python -m pipeoptim.options.generate`` from ``table.py``: change that, and run it again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from torch.amp.grad_scaler import GradScaler
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from pipeoptim.engine.stage.adagc import AdaGC
    from pipeoptim.engine.stage.clip import Clip
    from pipeoptim.engine.stage.tied_weights import TiedWeights
    from pipeoptim.engine.trace import Trace
    from pipeoptim.engine.transport.compression import Compression
    from pipeoptim.options.function_types import LossWeight, UpdateHook


class OptionKeywords(TypedDict, total=False):
    """Keyword arguments of every pipeline."""

    prediction: str
    refresh: int | None
    scale: float | str
    synchronous_updates: int
    seed: int | None
    clip: Clip | AdaGC | float | str | None
    autocast: torch.dtype | None
    scaler: GradScaler | Sequence[GradScaler] | Callable[[], GradScaler] | None
    on_update: UpdateHook | None
    monitor: bool | int
    uneven: bool
    loss_weight: LossWeight | None
    recompute: str
    overlap: bool
    slack: float | Sequence[float] | str
    compress: Compression | str | None
    trace: Trace | None
    on_bad: str
    outlier: float | None
    audit: int | None
    tied: TiedWeights | None
    weigh: LossWeight | None


class ProcessKeywords(OptionKeywords, total=False):
    """Those of pipelines whose stages live in several processes."""

    replicas: ProcessGroup | DeviceMesh | None
    transport: str
    checksums: bool
    timeout: float
    liveness_timeout: float | None
    survive: int | None
