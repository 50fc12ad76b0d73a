"""What clipping by the exact global norm costs a pipeline that never flushes: in ideal time, and measured in processes.

``python benchmarks/clipping.py`` prints the ideal figures (a forward takes 1, a backward 2, the rest nothing);
``python benchmarks/clipping.py --processes 2`` trains that many stages of an MLP, one process each, with each scope in turns.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import time

from pipeoptim.methods import get_method
from pipeoptim.schedule import Action, Kind

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
                if action.kind is Kind.F and k > 0:
                    needs.append((k - 1, action))
                if action.kind is Kind.B and k < depth - 1:
                    needs.append((k + 1, action))
                if any(need not in done for need in needs):
                    break
                queue.pop()
                if action.kind is Kind.U:
                    waiting[k] = action.number if waits else None
                    continue
                start = max([clock[k], *(done[need] for need in needs)])
                clock[k] = done[k, action] = start + (1.0 if action.kind is Kind.F else 2.0)
                waiting[k] = None
                if action.kind is Kind.B and (action.number + 1) % microbatches == 0:
                    done[k, action.number // microbatches] = clock[k]
    ends = [done[0, Action(Kind.B, n * microbatches - 1)] for n in (minibatches // 4, 3 * minibatches // 4)]
    return (ends[1] - ends[0]) / (minibatches / 2)


def ideal() -> None:
    print("ideal time per mini-batch with scope 'global', relative to no clipping")
    print("depth  " + "  ".join(f"M={name:<5}" for name in ("D-1", "D", "2D", "4D")))
    for depth in (2, 4, 8):
        cells = []
        for m in (depth - 1, depth, 2 * depth, 4 * depth):
            cells.append(seconds(depth, m, True) / seconds(depth, m, False))
        print(f"{depth:5}  " + "  ".join(f"{cell:<7.2f}" for cell in cells))


def measured(depth: int, microbatches: list[int]) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    base = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(depth), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--worker", *map(str, microbatches)]
    started = [subprocess.Popen(command, env={**base, "RANK": str(k)}) for k in range(depth)]
    sys.exit(max(p.wait() for p in started))


def worker(microbatches: list[int], width: int = 512, batch: int = 256, repeats: int = 5, steps: int = 30) -> None:
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.pipelining import PipelineStage

    import pipeoptim as po

    torch.set_num_threads(1)
    k, depth = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    x = torch.randn(batch, width)
    for m in microbatches:
        pipes = {}
        for scope in SCOPES:
            torch.manual_seed(k)
            module = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(4)))
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
        if k == depth - 1:
            medians = {scope: statistics.median(values) for scope, values in times.items()}
            print(
                f"{depth} processes, M={m}: {medians['none'] * 1e3:.1f} ms per mini-batch without clipping; relative: ", end=""
            )
            print(", ".join(f"{scope} {value / medians['none']:.2f}" for scope, value in medians.items()), flush=True)
        for pipe in pipes.values():
            pipe.close()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--processes", type=int, default=0)
    parser.add_argument("--worker", type=int, nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker)
    elif options.processes:
        measured(options.processes, [max(1, options.processes - 1), 2 * options.processes])
    else:
        ideal()
