"""One stage per process, on any number of machines; goes on from the newest checkpoint in a folder that all machines share.

On machine N of two, with a stage on each:
  torchrun --nnodes 2 --nproc-per-node 1 --node-rank N --master-addr FIRST --master-port 29500 examples/several_machines.py FOLDER
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage

import pipeoptim as po

STEPS, EVERY, BATCH, WIDTH = int(os.environ.get("STEPS", "300")), 100, 64, 64


def build_stage(k: int, depth: int) -> nn.Module:
    torch.manual_seed(k)  # each process builds its own stage only
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(8 // depth)))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A function of the step, so that a run that goes on sees what it would have seen."""
    x = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(step))
    return x, x.roll(1, dims=1).tanh()


def newest(folder: Path) -> Path | None:
    return max(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")), default=None)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group()  # rank, number of processes and the first machine's address come from torchrun
    k, depth = dist.get_rank(), dist.get_world_size()
    module = build_stage(k, depth)
    stage = PipelineStage(module, k, depth, torch.device("cpu"))
    pipe = po.Schedule(stage, torch.optim.AdamW(module.parameters(), lr=1e-3), nn.functional.mse_loss, microbatches=2)

    found = newest(folder)
    dist.barrier()  # nobody writes the next checkpoint before all have looked
    if found is not None:
        po.load_sharded(pipe, found)
    for step in range(pipe.version(k), STEPS):
        x, y = batch(step)
        loss = pipe.step(*([x] if k == 0 else []), target=y if k == depth - 1 else None)
        if (step + 1) % EVERY == 0 or step + 1 == STEPS:
            po.save_sharded(pipe, folder / f"step-{step + 1}")
            if loss is not None:  # on the last stage
                print(f"step {step + 1}: loss {loss:.4f}", flush=True)
    pipe.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
