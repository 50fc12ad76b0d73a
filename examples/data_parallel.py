"""Two pipelines of two stages side by side: pipeline parallelism times data parallelism on four processes.

Run it:  torchrun --nproc-per-node 4 examples/data_parallel.py
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage

import pipeoptim as po

STEPS, BATCH, WIDTH, DEPTH = int(os.environ.get("STEPS", "200")), 32, 64, 2


def build_stage(k: int) -> nn.Module:
    torch.manual_seed(k)
    return nn.Sequential(*[layer for _ in range(2) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())])


def batches(replica: int, replicas: int):
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    for _ in range(STEPS):
        x = torch.randn(replicas * BATCH, WIDTH, generator=generator).chunk(replicas)[replica]  # samples of its own
        yield x, torch.tanh(x @ teacher)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    replicas = dist.get_world_size() // DEPTH
    mesh = init_device_mesh("cpu", (replicas, DEPTH), mesh_dim_names=("data", "pipe"))
    k, replica = mesh["pipe"].get_local_rank(), mesh["data"].get_local_rank()
    module = build_stage(k)
    stage = PipelineStage(module, k, DEPTH, torch.device("cpu"), group=mesh["pipe"].get_group())
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    schedule = po.Schedule(stage, optimizer, nn.functional.mse_loss, replicas=mesh["data"])

    for step, (x, y) in enumerate(batches(replica, replicas)):
        loss = schedule.step(*([x] if k == 0 else []), target=y if k == DEPTH - 1 else None)
        if loss is not None and (step + 1) % (STEPS // 4) == 0:
            dist.all_reduce(loss, group=mesh["data"].get_group())  # each replica has the loss of its own samples
            if replica == 0:
                print(f"step {step + 1}: loss {loss / replicas:.4f}", flush=True)
    schedule.drain()
    if k == 0 and replica == 0:
        print(f"version gap of stage 0: {schedule.version_gap(0)}, the same as without replicas", flush=True)
    schedule.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
