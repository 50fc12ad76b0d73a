"""The keyword arguments of pipelines by the types in which users give them, for type checkers and signatures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    import torch
    from torch.amp.grad_scaler import GradScaler
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from pipeoptim.engine.stage.clip import Clip
    from pipeoptim.engine.stage.tied_weights import TiedWeights
    from pipeoptim.engine.trace import Trace
    from pipeoptim.engine.transport.compression import Compression

UpdateHook = Callable[[int, int], None]
"""``on_update(k, version)``, called after every update of stage k, with the latest weights in the module."""

LossWeight = Callable[[Any], Any]
"""``loss_weight(target) -> number``."""


class OptionKeywords(TypedDict, total=False):
    """Keyword arguments of every pipeline, by their types as users give them."""

    prediction: str
    seed: int | None
    clip: Clip | float | None
    autocast: torch.dtype | None
    scaler: GradScaler | Sequence[GradScaler] | Callable[[], GradScaler] | None
    on_update: UpdateHook | None
    monitor: bool | int
    uneven: bool
    loss_weight: LossWeight | None
    recompute: str
    overlap: bool
    compress: Compression | str | None
    trace: Trace | None
    tied: TiedWeights | None
    weigh: LossWeight | None  # the former name of loss_weight


class ProcessKeywords(OptionKeywords, total=False):
    """Those of pipelines whose stages live in several processes."""

    replicas: ProcessGroup | DeviceMesh | None
    transport: str
    timeout: float
    liveness_timeout: float | None
