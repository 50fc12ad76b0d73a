"""The default recipe with every optimizer, bfloat16, clipping by the global norm and a cosine; built alike by test and worker."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from pipeoptim.config import Component, TrainConfig
from pipeoptim.train import engines, optimizers
from pipeoptim.train.recipes import get_recipe
from pipeoptim.train.setup import RunSetup, build_setup

STAGES, STEPS = 4, 6
RATES = {"adadelta": 1.0, "sgd": 0.1, "momentum": 0.1, "nesterov": 0.1, "adagrad": 0.01}
GROUPS = [{"ndim": 2, "prediction": "displacement"}, {"prediction": "none"}]
ALONE = {"muon"}  # takes matrices only: it runs as muon_adamw

CASES: dict[str, Component] = {
    name: Component(name, {"lr": RATES.get(name, 0.002)})
    for name in sorted({*optimizers.known(), *optimizers.ALIASES, *optimizers.OWN} - ALONE)
}
CASES["one per stage"] = Component("muon_adamw,sgd,nadam,adamw", {"lr": {"by_stage": [0.002, 0.1, 0.002, 0.003]}})
CASES["groups"] = Component("adamw", {"lr": 0.003, "groups": GROUPS})
if find_spec("lion_pytorch"):
    CASES["lion"] = Component("lion_pytorch:Lion", {"lr": 0.0005})


@cache
def _built() -> RunSetup:
    """Data and model, which are the same in every case, read once."""
    recipe = get_recipe("chars", tiny=True)
    assert recipe.lr_schedule.target == "cosine"
    config: TrainConfig = replace(
        recipe,
        lr_schedule=recipe.lr_schedule.with_options(warmup=2),
        data=recipe.data.with_options(max_bytes=100_000),
        stages=STAGES,
        steps=STEPS,
        batch_size=8,
        eval_batches=1,
        clip=0.5,
        clip_scope="global",
        autocast="bfloat16",
    )
    return build_setup(config)


def run_setup(name: str) -> RunSetup:
    """The setup of a run of a case."""
    base, optimizer = _built(), CASES[name]
    config = replace(base.config, optimizer=optimizer)
    return replace(
        base, config=config, stages=copy.deepcopy(base.stages), optimizer=optimizers.factory(optimizer, config.stages)
    )


def train(run: RunSetup, pipe: engines.Pipeline) -> dict[int, dict[str, Any]]:
    """What the stages of this process end with."""
    losses = []
    for step in range(STEPS):
        x, y = run.task.train_batch(step, run.config.batch_size)
        feed = [x] if 0 in pipe.local_stages else []
        losses.append(pipe.step(*feed, target=y if STAGES - 1 in pipe.local_stages else None))
    pipe.drain()
    return {
        k: {
            "weights": list(run.stages[k].parameters()),
            "state": pipe.stage_state_dict(k),
            "norm": pipe.grad_norm(k),
            "losses": torch.stack([loss for loss in losses if loss is not None]) if k == STAGES - 1 else None,
        }
        for k in pipe.local_stages
    }
