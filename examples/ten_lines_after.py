"""The script of ten_lines_before.py, asynchronous: no flush, and forwards on predicted weights.

Run it:  torchrun --nproc-per-node 2 examples/ten_lines_after.py
See what changed:  diff examples/ten_lines_before.py examples/ten_lines_after.py
"""

import os
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage

import pipeoptim as po

STEPS, BATCH, WIDTH = int(os.environ.get("STEPS", "300")), 64, 256


def build_stage(k: int, depth: int) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(8)]
    return nn.Sequential(*layers[k * 8 // depth : (k + 1) * 8 // depth])


def batches():
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    for _ in range(STEPS):
        x = torch.randn(BATCH, WIDTH, generator=generator)
        yield x, torch.tanh(x @ teacher)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group()
    k, depth = dist.get_rank(), dist.get_world_size()
    first, last = k == 0, k == depth - 1
    module = build_stage(k, depth)
    stage = PipelineStage(module, k, depth, torch.device("cpu"))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    schedule = po.Schedule(stage, optimizer, nn.functional.mse_loss)

    start = time.perf_counter()
    for step, (x, y) in enumerate(batches()):
        losses = []
        schedule.step(*([x] if first else []), target=y if last else None, losses=losses)
        if last and step % 50 == 49:
            loss = torch.stack(losses).mean()
            print(f"step {step + 1}: loss {loss:.4f}", flush=True)
    schedule.drain()
    if last:
        print(f"{STEPS * BATCH / (time.perf_counter() - start):.0f} samples/s", flush=True)
    schedule.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
