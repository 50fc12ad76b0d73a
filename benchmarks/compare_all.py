"""Compare all methods at depths 4 and 8, on the two embedded recipes, under three optimizers, in both regimes.

    python benchmarks/compare_all.py [--jobs 2] [--seeds 3] [--work runs/compare_all]

Regimes: M = 1 (every mini-batch updates: a stage's weights move up to D-1 times between F and B) and M = D (at most once).
The learning rate of each optimizer is the best of a few for synchronous training with seed 0, the same for all methods. Continues
where it was stopped. Writes benchmarks/results/compare-<recipe>.json after every comparison; benchmarks/render_results.py makes
docs/results_short.md of them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import compare_models

from pipeoptim.compare.api import compare
from pipeoptim.compare.settings import ComparisonSettings
from pipeoptim.compare.statistics import Spread
from pipeoptim.compare.summary import Comparison
from pipeoptim.config import Component, TrainConfig
from pipeoptim.methods import METHODS
from pipeoptim.train.machine import machine

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SYNCHRONOUS = "1f1b"
DEPTHS = (4, 8)


@dataclass(frozen=True)
class Choice:
    """An optimizer and the learning rates that it is tried with."""

    component: Component
    rates: tuple[float, ...]


OPTIMIZERS = {
    "adamw": Choice(Component("adamw", {"weight_decay": 0.01}), (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)),
    "sgd": Choice(Component("sgd", {"momentum": 0.9}), (0.02, 0.05, 0.1, 0.2, 0.4)),
    "rmsprop": Choice(Component("rmsprop", {"alpha": 0.99}), (5e-4, 1e-3, 2e-3, 4e-3)),
}
RECIPES = {"digits": compare_models.digits, "chars": compare_models.chars}


def methods(optimizer: str, split: bool, steps: int) -> tuple[str, ...]:
    """All methods; variants, and those that bring their own optimizer, beside AdamW only, for elsewhere they would be the same runs
    again. Beside the others, where mini-batches are split, a few to hold pipedream_2bw against.

    PipeMare raises its learning rate over 1,000 updates by default, longer than these runs: here over a quarter of each.
    """
    if optimizer == "adamw":
        names = list(METHODS)
    elif split:
        names = [SYNCHRONOUS, "naive", "pipedream", "pipedream_2bw", "pipeoptim"]
    else:
        names = [name for name, method in METHODS.items() if not (method.optimizer or "+" in name)]
    return tuple(f"pipemare(anneal_updates={steps // 4})" if name == "pipemare" else name for name in names)


def best_rate(base: TrainConfig, choice: Choice, jobs: int, work: Path) -> tuple[float, dict[str, float | None]]:
    """The learning rate with the lowest final validation loss of synchronous training, and the losses of all."""
    losses: dict[str, float | None] = {}
    for rate in choice.rates:
        config = replace(base, optimizer=choice.component.with_options(lr=rate), microbatches=1)
        done = compare(ComparisonSettings(config, (SYNCHRONOUS,)), work / f"lr-{rate:g}", jobs, progress=False)
        losses[f"{rate:g}"] = done.outcomes[0].val_loss
    best = min((loss, rate) for rate, loss in losses.items() if loss is not None)[1]
    return float(best), losses


def settings(base: TrainConfig, seeds: int) -> Iterator[tuple[str, ComparisonSettings]]:
    """Depth by depth and regime by regime."""
    for depth in DEPTHS:
        for m in (1, depth):
            config = replace(base, stages=depth, microbatches=m)
            yield (
                f"D{depth}-M{m}",
                ComparisonSettings(config, methods(base.optimizer.target, m > 1, base.steps), tuple(range(seeds))),
            )


def record(done: Comparison, rates: dict[str, float | None]) -> dict[str, Any]:
    """What a table and a figure need of one comparison."""
    config = done.settings.config
    return {
        "stages": config.stages,
        "microbatches": config.microbatches,
        "optimizer": config.optimizer.target,
        "lr": config.optimizer.options["lr"],
        "lr_tried": rates,
        "seeds": len(done.settings.seeds),
        "target": done.target,
        "left_out": dict(done.left_out),
        "lines": [asdict(line) for line in done.lines()],
        "curves": {name: curve(done, name) for name in done.methods},
    }


def curve(done: Comparison, method: str) -> list[list[float]]:
    """Step, mean, smallest and largest validation loss of the seeds that finished."""
    runs = [o.validation for o in done.of(method) if o.finished]
    points = []
    for n, step in enumerate(runs[0].steps if runs else ()):
        spread = Spread.of(run.values[n] for run in runs if n < len(run.values))
        if spread:
            points.append([step, *(float(f"{x:.5g}") for x in (spread.mean, spread.low, spread.high))])
    return points


def write(recipe: str, base: TrainConfig, records: list[dict[str, Any]]) -> None:
    data = {
        "recipe": recipe,
        "about": " ".join((RECIPES[recipe].__doc__ or "").split("\n\n")[0].split()),
        "steps": base.steps,
        "batch_size": base.batch_size,
        "prediction": base.prediction,
        "machine": machine(),
        "comparisons": records,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    part = RESULTS / f"compare-{recipe}.json.part"
    part.write_text(json.dumps(data, separators=(",", ":"), allow_nan=False) + "\n")
    part.replace(part.with_suffix(""))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "compare_all")
    options = parser.parse_args()
    began = time.monotonic()
    for recipe, make in RECIPES.items():
        base = replace(make(), prediction="paper", checkpoint_every=0, threads=1)
        records = []
        for name, choice in OPTIMIZERS.items():
            work = options.work / recipe / name
            rate, rates = best_rate(base, choice, options.jobs, work)
            tuned = replace(base, optimizer=choice.component.with_options(lr=rate))
            for label, setting in settings(tuned, options.seeds):
                done = compare(setting, work / f"lr-{rate:g}-{label}", options.jobs, progress=False)
                records.append(record(done, rates))
                write(recipe, base, records)
                print(f"{time.monotonic() - began:6.0f} s  {recipe} {name} lr {rate:g} {label}", flush=True)


if __name__ == "__main__":
    main()
