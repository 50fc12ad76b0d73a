"""A processor that computes one update wrongly, once in a run."""

from __future__ import annotations

import weakref
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import tiny
from pipeoptim.config import Component, TrainConfig


class Faulty(torch.optim.SGD):
    """Flips a bit of a weight in its tenth step, where no other process has; copies of it are sound."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self.steps, self.original = 0, weakref.ref(self)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        super().step()
        self.steps += 1
        if self.steps == 10 and self.original() is self:
            with suppress(FileExistsError):
                Path("flipped").touch(exist_ok=False)
                self.param_groups[0]["params"][1].view(torch.int32)[2] ^= 1 << 20


def recipe() -> TrainConfig:
    return replace(tiny.recipe(), optimizer=Component("faulty:Faulty", {"lr": 0.05, "momentum": 0.9}))
