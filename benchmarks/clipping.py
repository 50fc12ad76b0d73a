"""What clipping by the exact global norm costs a pipeline that never flushes: in ideal time, and measured in processes.

``python benchmarks/clipping.py`` computes the ideal figures (a forward takes 1, a backward 2, the rest nothing) and trains stages
that emulate devices of fixed speed (see `pipeoptim.bench.efficiency`), one process each, with each scope in turns; it writes
``benchmarks/results/clipping.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pipeoptim.bench.record import Record, ResultRow
from pipeoptim.methods import get_method
from pipeoptim.schedule import Action, ActionKind

MILLISECONDS = 10  # of a stage, for forward and backward of a mini-batch
SCOPES = ("none", "stage", "global_delayed", "global")


def seconds(depth: int, microbatches: int, waits: bool, minibatches: int = 40) -> float:
    """Ideal time per mini-batch in steady state, when an update waits for the norm of all stages."""
    program = get_method("pipeoptim").program(depth, microbatches)
    todo = [program.full(k, minibatches)[::-1] for k in range(depth)]
    clock, done = [0.0] * depth, {}
    waiting: list[int | None] = [None] * depth  # the mini-batch whose update is due before the next action
    while any(todo):
        for k, queue in enumerate(todo):
            while queue:
                action = queue[-1]
                needs = [(j, waiting[k]) for j in range(depth)] if waiting[k] is not None else []
                if action.kind is ActionKind.F and k > 0:
                    needs.append((k - 1, action))
                if action.kind is ActionKind.B and k < depth - 1:
                    needs.append((k + 1, action))
                if any(need not in done for need in needs):
                    break
                queue.pop()
                if action.kind is ActionKind.U:
                    waiting[k] = action.number if waits else None
                    continue
                start = max([clock[k], *(done[need] for need in needs)])
                clock[k] = done[k, action] = start + (1.0 if action.kind is ActionKind.F else 2.0)
                waiting[k] = None
                if action.kind is ActionKind.B and (action.number + 1) % microbatches == 0:
                    done[k, action.number // microbatches] = clock[k]
    ends = [done[0, Action(ActionKind.B, n * microbatches - 1)] for n in (minibatches // 4, 3 * minibatches // 4)]
    return (ends[1] - ends[0]) / (minibatches / 2)


def ideal() -> list[ResultRow]:
    rows = []
    for depth in (2, 4, 8):
        for label, m in (("D-1", depth - 1), ("D", depth), ("2D", 2 * depth), ("4D", 4 * depth)):
            ratio = seconds(depth, m, True) / seconds(depth, m, False)
            settings = {"depth": depth, "microbatches": m, "scope": "global", "ideal": True}
            rows.append(ResultRow(f"global, D = {depth}, M = {label} (ideal time)", [ratio], settings))
    return rows


def measured(depth: int, microbatches: list[int]) -> list[ResultRow]:
    """One row per scope and M; samples are ratios to no clipping in the same turn."""
    from pipeoptim.engine.processes.loopback import loopback_environment, loopback_store

    store = loopback_store()
    base = {**os.environ, **loopback_environment(store), "WORLD_SIZE": str(depth), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        command = [sys.executable, __file__, "--found", str(found), "--worker", *map(str, microbatches)]
        started = [subprocess.Popen(command, env={**base, "RANK": str(k)}) for k in range(depth)]
        if any(p.wait() for p in started):
            sys.exit("a stage failed")
        return [ResultRow(**row) for row in json.loads(found.read_text())]


def worker(found: Path, microbatches: list[int], width: int = 256, repeats: int = 7, steps: int = 40) -> None:
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.pipelining import PipelineStage

    import pipeoptim as po
    from pipeoptim.bench.efficiency import BATCH, Device, WaitingStage

    torch.set_num_threads(1)
    k, depth = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    x = torch.ones(BATCH, width)
    rows = []
    for m in microbatches:
        pipes = {}
        for scope in SCOPES:
            module = WaitingStage(Device(MILLISECONDS / 3000, 0.0, seed=k), width)
            clip = None if scope == "none" else po.Clip(1.0, scope)
            stage = PipelineStage(module, k, depth, torch.device("cpu"))
            optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
            pipes[scope] = po.Schedule(stage, optimizer, nn.functional.mse_loss, "pipeoptim", m, clip=clip)
        times: dict[str, list[float]] = {scope: [] for scope in SCOPES}
        for _ in range(repeats):
            for scope, pipe in pipes.items():
                began = time.perf_counter()
                for _ in range(steps):
                    pipe.step(*([x] if k == 0 else []), target=x if k == depth - 1 else None)
                pipe.drain()
                dist.barrier()
                times[scope].append((time.perf_counter() - began) / steps)
        for scope in SCOPES[1:]:
            ratios = [mine / none for mine, none in zip(times[scope], times["none"], strict=True)]
            settings = {
                "depth": depth,
                "microbatches": m,
                "scope": scope,
                "ideal": False,
                "ms": 1e3 * statistics.median(times[scope]),
            }
            rows.append(
                {
                    "name": f"{scope}, D = {depth}, M = {m} (measured, stages of {MILLISECONDS} ms)",
                    "samples": ratios,
                    "settings": settings,
                }
            )
        for pipe in pipes.values():
            pipe.close()
    if k == 0:
        found.write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--processes", type=int, default=4, help="stages that are trained; 0: only the ideal times")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/clipping.json"))
    parser.add_argument("--found", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=int, nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.found, options.worker)
        sys.exit()
    rows = ideal()
    if options.processes:
        depth = options.processes
        rows += measured(depth, [depth, 2 * depth, 4 * depth])
    record = Record("clipping", "time of no clipping", {"ms per stage": MILLISECONDS, "threads": 1}, rows)
    print(f"written to {record.write(options.out)}")
    for row in rows:
        print(f"{row.name:48} {row.median:.3f}")
