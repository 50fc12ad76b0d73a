"""How long training stands still for a checkpoint: written while it waits, or copied and written in the background.

python benchmarks/saving.py     writes benchmarks/results/saving.json, which docs/failures.md shows
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import pipeoptim as po
from pipeoptim.bench.record import Record, ResultRow
from pipeoptim.checkpoint import BackgroundWriter, save
from pipeoptim.train.group import SingleProcessGroup

WIDTH, LAYERS, BATCH, REPEATS, STEPS = 1024, 8, 64, 9, 20
RESULT = Path(__file__).parent / "results" / "saving.json"


def main() -> None:
    torch.set_num_threads(1)
    stages = [nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS // 2))) for _ in range(2)]
    pipe = po.Emulator(stages, lambda p: torch.optim.AdamW(p, lr=1e-5), nn.functional.mse_loss)
    x = torch.randn(BATCH, WIDTH)
    stands: dict[str, list[float]] = {"wait": [], "background, the first": [], "background": []}
    steps: dict[str, list[float]] = {"no checkpoint under way": [], "while one is written": []}

    def train() -> float:
        began = time.perf_counter()
        for _ in range(STEPS):
            pipe.step(x, target=x)
        return 1000 * (time.perf_counter() - began) / STEPS

    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        writer = BackgroundWriter(Path(folder), SingleProcessGroup(), config="", keep=1, versions={})
        for repeat in range(REPEATS):
            for name in ("wait", "background"):
                steps["no checkpoint under way"].append(train())
                pipe.drain()
                states = {k: pipe.stage_state_dict(k) for k in range(2)}
                began = time.perf_counter()
                if name == "wait":
                    save(Path(folder), repeat, states, group=SingleProcessGroup(), config="", keep=1, versions={})
                else:
                    writer.begin(repeat, states)
                stood = 1000 * (time.perf_counter() - began)
                stands["background, the first" if name == "background" and not repeat else name].append(stood)
                if name == "background":
                    steps["while one is written"].append(train())
                    writer.finish()
    megabytes = round(3 * sum(p.numel() * p.element_size() for stage in stages for p in stage.parameters()) / 2**20)
    settings = {"state in MiB": megabytes, "ms per mini-batch": round(sorted(steps["no checkpoint under way"])[REPEATS], 1)}
    Record("saving", "ms that training stands still", settings, [ResultRow(*row) for row in stands.items()]).write(RESULT)
    for name, values in (stands | steps).items():
        print(f"{name}: {sorted(values)[len(values) // 2]:.1f} ms")


if __name__ == "__main__":
    main()
