"""Recipes of milliseconds for comparisons, one that misbehaves on demand, and folders of runs written by hand."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeoptim.compare.folder import ComparisonFolder
from pipeoptim.compare.plan import plan_comparison
from pipeoptim.compare.settings import ComparisonSettings
from pipeoptim.config import Component, TrainConfig


def model() -> nn.Sequential:
    """Four blocks with weights."""
    return nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)), nn.Linear(6, 3))


class Task:
    """Random inputs, labels that depend on them. At seed 1 its process dies with COMPARE_DIE set, and waits with COMPARE_HOLD."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def _batch(self, seed: int, size: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(size, 6, generator=torch.Generator().manual_seed(seed))
        return x, (x[:, :3] + x[:, 3:]).argmax(1)

    def train_batch(self, step: int, batch_size: int) -> tuple[Tensor, Tensor]:
        if "COMPARE_DIE" in os.environ and self.seed == 1 and step == 2:
            os._exit(9)
        if "COMPARE_HOLD" in os.environ and self.seed == 1 and step == 2:
            time.sleep(60)
        return self._batch(1000 * self.seed + step, batch_size)

    def validation_batches(self, batch_size: int) -> list[tuple[Tensor, Tensor]]:
        return [self._batch(7 + i, batch_size) for i in range(4)]

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target)

    def metrics(self, output: Tensor, target: Tensor) -> dict[str, float]:
        return {"accuracy": float((output.argmax(-1) == target).float().mean())}

    def describe(self) -> str:
        return "random numbers"


def recipe() -> TrainConfig:
    """20 steps, 4 stages."""
    return TrainConfig(
        recipe="case",
        model=Component("compare_cases:model"),
        data=Component("compare_cases:Task"),
        optimizer=Component("adamw", {"lr": 0.01, "weight_decay": 0.1}),
        lr_schedule=Component("cosine", {"warmup": 4, "final": 0.1}),
        stages=4,
        microbatches=4,
        batch_size=8,
        steps=20,
        eval_every=5,
        eval_batches=2,
    )


def write_comparison(
    path: Path, losses: dict[str, dict[int, Sequence[float] | str]], steps: int = 20, **changes: Any
) -> tuple[ComparisonFolder, ComparisonSettings]:
    """A folder as a comparison leaves it: ``losses[method][seed]`` are validation losses, evenly spread over the steps, and the
    training losses are 1 more; or the status of a run that ended otherwise."""
    names = tuple(losses)
    seeds = tuple(dict.fromkeys(seed for runs in losses.values() for seed in runs)) or (0,)
    own = {key: changes.pop(key) for key in ("target", "own_lr", "same_optimizer") if key in changes}
    settings = ComparisonSettings(replace(recipe(), steps=steps, **changes), names, seeds, **own)
    folder = ComparisonFolder(path)
    machine = {"processor": "abacus", "cores": 2, "gpus": [], "system": "none", "python": "3", "torch": "2", "pipeoptim": "0"}
    folder.begin(settings, "pipeoptim compare --of <tests>", machine)
    for run in plan_comparison(settings).runs:
        values = losses[run.config.method][run.config.seed]
        write_run(folder.run(run.name), run.config, values)
    return folder, settings


def write_run(path: Path, config: TrainConfig, values: Sequence[float] | str) -> None:
    """A run's folder: its configuration, figures and outcome."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(config.to_json())
    status = "finished" if not isinstance(values, str) else values
    values = [2.0] if isinstance(values, str) else values
    every = config.steps // len(values)
    rows: list[dict[str, Any]] = []
    for step in range(1, config.steps + 1 if status == "finished" else 4):
        loss = values[min(len(values) - 1, (step - 1) // every)] + 1
        rows.append({"step": step, "loss": loss, "lr": 0.01, "samples_per_second": 80.0})
        if step % every == 0 and step // every <= len(values):
            rows.append({"step": step, "val_loss": values[step // every - 1], "val_accuracy": 0.5})
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome = {"status": status, "step": config.steps} | ({} if status == "finished" else {"reason": f"it {status}"})
    (path / "outcome.json").write_text(json.dumps(outcome))
    if status == "finished":
        stages = [
            {"stage": k, "parameters": 9, "gap": 0, "weight_copies": 2, "weight_bytes": 100 + k, "updates": config.steps}
            for k in range(config.stages)
        ]
        result = {"samples_per_second": 80.0, "stages": stages, "versions": {"torch": "2"}, "data": "made <up>"}
        (path / "result.json").write_text(json.dumps(result))
