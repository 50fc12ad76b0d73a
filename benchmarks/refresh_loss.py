"""What predictions from the mini-batch in progress close of the gap to synchronous training, by how often they are made anew.

``python benchmarks/refresh_loss.py`` writes ``benchmarks/results/refresh_loss.json``: the validation loss of a character GPT after some
hundred updates at D = M = 8. It takes ten minutes; run again, it makes only what is missing.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import pipeoptim as po
from pipeoptim.bench.record import Record, ResultRow
from pipeoptim_zoo.data.stdlib_text import chars
from pipeoptim_zoo.models.gpt import gpt

DEPTH, BATCH, CONTEXT, WARM_UP, LR = 8, 16, 64, 100, 3e-3
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "synchronous (1f1b)": ("1f1b", {}),
    "no prediction (naive)": ("naive", {}),
    "last momentum (refined)": ("pipeoptim", {}),
    **{f"in progress, refresh {r}": ("pipeoptim", {"prediction": "in_progress", "refresh": r}) for r in (1, 2, 4, 8)},
}


def validation_loss(method: str, options: dict[str, Any], steps: int, seed: int) -> float:
    """AdamW, warm-up, cosine, gradients of each stage clipped to norm 1; 40 batches of validation at the end."""
    task = chars(context=CONTEXT)
    torch.manual_seed(seed)
    embedding, *blocks, head = gpt(vocab_size=98, context=CONTEXT, width=64, layers=DEPTH, heads=4, dropout=0.0)
    stages = [nn.Sequential(block) for block in blocks]
    stages[0], stages[-1] = nn.Sequential(embedding, blocks[0]), nn.Sequential(blocks[-1], head)
    optimizers = [torch.optim.AdamW(s.parameters(), lr=LR, weight_decay=0.01) for s in stages]
    schedulers = [LambdaLR(optimizer, _rate(steps)) for optimizer in optimizers]
    pipe = po.Emulator(stages, optimizers, _loss, method, DEPTH, schedulers=schedulers, clip=1.0, **options)
    for step in range(steps):
        x, y = task.train_batch(seed * steps + step, BATCH)
        pipe.step(x, target=y)
    pipe.drain()
    found = [float(pipe.eval_step(x, target=y)) for x, y in islice(task.validation_batches(32), 40)]
    return sum(found) / len(found)


def _rate(steps: int) -> Callable[[int], float]:
    return lambda t: min(1.0, (t + 1) / WARM_UP) * (0.1 + 0.45 * (1 + math.cos(math.pi * min(t, steps) / steps)))


def _loss(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())


def write(losses: dict[str, list[float]], steps: int, out: Path) -> None:
    """Which share of the gap between no prediction and synchronous training each contender closes, in the order of the seeds."""
    rows, (synchronous, naive) = [], list(losses.values())[:2]
    for name, values in losses.items():
        closed = [100 * (n - v) / (n - s) for n, v, s in zip(naive, values, synchronous, strict=False)]
        mean = sum(values) / len(values)
        rows.append(ResultRow(f"{name}, validation loss {mean:.3f}", closed, {"contender": name, "losses": values}))
    Record("refresh loss", "% closed", {"updates": steps, "seeds": len(synchronous), "D = M": DEPTH}, rows).write(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/refresh_loss.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = Record.read(options.out) if options.out.exists() else None
    found = (
        {row.settings["contender"]: row.settings["losses"] for row in known.rows}
        if known and known.settings["updates"] == options.steps
        else {}
    )
    for name, (method, chosen) in CONTENDERS.items():
        for seed in range(len(found.get(name, [])), options.seeds):
            found.setdefault(name, []).append(validation_loss(method, chosen, options.steps, seed))
            if len(found) > 1:
                write(found, options.steps, options.out)
            print(f"{name:30} {found[name][-1]:.3f}", flush=True)
