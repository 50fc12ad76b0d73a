"""The parts of a training loop that a user may switch on, as both engines pass them to their stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.amp.grad_scaler import GradScaler

from pipeoptim.engine.stage.autocast import check_autocast
from pipeoptim.engine.stage.clip import Clip
from pipeoptim.engine.transport.compression import Compression
from pipeoptim.errors import ConfigError

UpdateHook = Callable[[int, int], None]
"""``on_update(k, version)``, called after every update of stage k, with the latest weights in the module."""


@dataclass(frozen=True)
class StageOptions:
    """What a stage does besides forward, backward and optimizer step; everything is off by default.

    Args:
        clip: gradient clipping.
        autocast: type that F and the loss are computed in where torch.autocast lowers it.
        scaler: loss scaling for float16; one of its own per stage.
        on_update: called after every update.
        monitor: measure the predictions made at every so many versions; True: as many as keep the cost below 1 % of the update, at most 10.
        recompute: on which weights activation checkpoints run again, see :mod:`pipeoptim.engine.stage.recompute`.
        compress: of what is sent to the stages before and after.

    Raises:
        ConfigError: a type that autocast does not know, or a monitor below 0.
    """

    clip: Clip | None = None
    autocast: torch.dtype | None = None
    scaler: GradScaler | None = None
    on_update: UpdateHook | None = None
    monitor: bool | int = False
    recompute: str = "backward"
    compress: Compression | None = None

    def __post_init__(self) -> None:
        check_autocast(self.autocast)
        if not isinstance(self.monitor, int) or self.monitor < 0:
            raise ConfigError(f"monitor is {self.monitor!r}, must be True, False or a number of versions, for example 10")
        if self.scaler is not None and not isinstance(self.scaler, GradScaler):
            raise ConfigError(
                f"scaler is a {type(self.scaler).__name__}, must be a torch.amp.GradScaler; the emulator takes one per stage: "
                'scaler=lambda: torch.amp.GradScaler("cuda")'
            )

    def describe(self) -> str:
        """What must be the same on every stage."""
        scaling = self.scaler is not None and self.scaler.is_enabled()
        return f"clip={self.clip} autocast={self.autocast} scaler={'on' if scaling else 'off'} compress={self.compress}"


OFF = StageOptions()
