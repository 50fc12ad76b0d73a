"""What recording a trace costs: the same pipeline of two processes with and without one, in turns.

python benchmarks/trace_cost.py     writes benchmarks/results/trace_cost.json, which docs/traces.md shows
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

WIDTH, BATCH, REPEATS, STEPS = 256, 64, 9, 200
KINDS = {"no trace": None, "trace, but its mini-batches are over": 1, "trace": REPEATS * STEPS + STEPS}
RESULT = Path(__file__).parent / "results" / "trace_cost.json"


def main() -> None:
    from pipeoptim.engine.processes.loopback import loopback_environment, loopback_store

    store = loopback_store()
    base = {**os.environ, **loopback_environment(store), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen([sys.executable, __file__, "--worker"], env={**base, "RANK": str(k)}) for k in range(2)]
    sys.exit(max(p.wait() for p in started))


def worker() -> None:
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.pipelining import PipelineStage

    import pipeoptim as po
    from pipeoptim.bench.record import Record, ResultRow

    torch.set_num_threads(1)
    k = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    x = torch.randn(BATCH, WIDTH)
    pipes = {}
    for name, steps in KINDS.items():
        module = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4)))
        stage, optimizer = PipelineStage(module, k, 2, torch.device("cpu")), torch.optim.AdamW(module.parameters(), lr=1e-4)
        trace = None if steps is None else po.Trace(steps)
        pipes[name] = po.Schedule(stage, optimizer, nn.functional.mse_loss, trace=trace)
    rates: dict[str, list[float]] = {name: [] for name in pipes}
    for repeat in range(REPEATS + 1):
        for name, pipe in pipes.items():
            dist.barrier()
            began = time.perf_counter()
            for _ in range(STEPS):
                pipe.step(*([x] if k == 0 else []), target=x if k == 1 else None)
            pipe.drain()
            dist.barrier()
            if repeat:  # the first round warms up
                rates[name].append(BATCH * STEPS / (time.perf_counter() - began))
    if k == 1:
        settings = {
            "model": f"MLP, 4 layers of {WIDTH} per stage",
            "batch": BATCH,
            "processes": 2,
            "threads": 1,
            "repeats": REPEATS,
        }
        record = Record("trace_cost", "samples/s", settings, [ResultRow(name, values) for name, values in rates.items()])
        record.write(RESULT)
        plain = record.row("no trace").median
        print(", ".join(f"{row.name}: {row.median:.0f} samples/s ({row.median / plain - 1:+.1%})" for row in record.rows))
    for pipe in pipes.values():
        pipe.close()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    worker() if "--worker" in sys.argv else main()
