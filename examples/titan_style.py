"""A set-up in the style of torchtitan, without needing it: configuration, DeviceMesh, parallelism from outside, containers.

Run it:  torchrun --nproc-per-node 2 examples/titan_style.py        (4 processes: two replicas of the pipeline)
Then:    tensorboard --logdir runs/titan      and open runs/titan/trace/trace.json with https://ui.perfetto.dev
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage
from torch.utils.tensorboard import SummaryWriter

import pipeoptim as po


class Config:
    dim, layers, vocab, batch, lr = 32, 4, 16, 16, 3e-3
    cuts = (0, 3, 6)  # a stage per pair of neighbours; as many pipelines side by side as there are processes for
    steps, folder = int(os.environ.get("STEPS", "60")), sys.argv[1] if len(sys.argv) > 1 else "runs/titan"


def build_model(c: Config) -> nn.Sequential:  # for one device: the model knows of no parallelism
    torch.manual_seed(0)
    blocks = [nn.TransformerEncoderLayer(c.dim, 4, 2 * c.dim, 0.0, batch_first=True) for _ in range(c.layers)]
    return nn.Sequential(nn.Embedding(c.vocab, c.dim), *blocks, nn.Linear(c.dim, c.vocab))


def parallelize(model: nn.Sequential, mesh, c: Config) -> PipelineStage:  # from outside
    k, depth = mesh.get_local_rank(), mesh.size()
    return PipelineStage(model[c.cuts[k] : c.cuts[k + 1]], k, depth, torch.device("cpu"), group=mesh.get_group())


def loss_fn(logits, y):
    return nn.functional.cross_entropy(logits.mT, y)


class Container:  # of optimizers or schedulers, one per model part, as torchtitan has them; the pipeline steps them
    def __init__(self, make, parts) -> None:
        self.all = [make(part) for part in parts]


class Trainer:
    def __init__(self, c: Config) -> None:
        self.c, depth = c, len(c.cuts) - 1
        mesh = init_device_mesh("cpu", (dist.get_world_size() // depth, depth), mesh_dim_names=("dp_replicate", "pp"))
        self.k, self.last, self.replica = mesh["pp"].get_local_rank(), depth - 1, mesh["dp_replicate"].get_local_rank()
        stage = parallelize(build_model(c), mesh["pp"], c)
        self.optimizers = Container(lambda part: torch.optim.AdamW(part.parameters(), lr=c.lr), [stage.submod])
        self.schedulers = Container(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, c.steps), self.optimizers.all)
        self.trace = po.Trace(steps=20, skip=5)
        options = {"scheduler": self.schedulers.all[0], "replicas": mesh["dp_replicate"], "trace": self.trace}
        self.schedule = po.Schedule(stage, self.optimizers.all[0], loss_fn, microbatches=2, **options)

    def train(self) -> None:
        c, board, generator = self.c, SummaryWriter(self.c.folder), torch.Generator().manual_seed(self.replica)
        for step in range(1, c.steps + 1):
            with self.trace.span("data"):
                x = torch.randint(c.vocab, (c.batch, 8), generator=generator)  # to be copied
            loss = self.schedule.step(*([x] if self.k == 0 else []), target=x if self.k == self.last else None)
            if loss is not None and self.replica == 0:
                board.add_scalar("train/loss", loss, step)
                board.add_scalar("train/lr", self.schedulers.all[0].get_last_lr()[0], step)
        self.schedule.drain()
        board.close()
        self.trace.save(f"{c.folder}/trace")  # every process; then one of them merges
        dist.barrier()
        if self.replica == 0 and self.k == self.last:
            print(f"loss {loss:.4f}\n{po.merge_trace(f'{c.folder}/trace').to_text()}", flush=True)
        self.schedule.close()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    Trainer(Config()).train()
    dist.destroy_process_group()
