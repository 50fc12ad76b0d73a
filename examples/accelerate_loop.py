"""A loop in the style of Hugging Face Accelerate: it sets up the processes, loads, prints and tracks; the pipeline trains.

Run it:  accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py
    or:  torchrun --nproc-per-node 2 examples/accelerate_loop.py
"""

import os
import sys

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.utils.data import DataLoader, TensorDataset

import pipeoptim as po

EPOCHS, BATCH, WIDTH = int(os.environ.get("EPOCHS", "4")), 32, 32


def build_stage(k: int, depth: int) -> nn.Module:
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(0.05)) for _ in range(6)]
    head = [nn.Linear(WIDTH, 4)] if k == depth - 1 else []
    return nn.Sequential(*layers[k * 6 // depth : (k + 1) * 6 // depth], *head)


def data_set(seed: int, size: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, WIDTH, generator=generator)
    return TensorDataset(x, x.view(size, 4, -1).sum(-1).argmax(1))


def main() -> None:
    folder = sys.argv[1] if len(sys.argv) > 1 else "runs/accelerate"
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), log_with="tensorboard", project_dir=folder)
    accelerator.init_trackers("pipeline", config={"batch": BATCH, "width": WIDTH})
    set_seed(0)  # the same in all processes: they must draw the same batches
    k, depth = accelerator.process_index, accelerator.num_processes
    first, last = k == 0, k == depth - 1

    # What must not be prepared: Accelerate would wrap the model for data parallelism and deal out the batches.
    train = DataLoader(data_set(1, 40 * BATCH), BATCH, shuffle=True, generator=torch.Generator().manual_seed(2))
    held_out = DataLoader(data_set(3, 8 * BATCH), BATCH)
    module = build_stage(k, depth).to(accelerator.device)
    optimizer = torch.optim.AdamW(module.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=EPOCHS * len(train))
    stage = PipelineStage(module, k, depth, accelerator.device)
    pipe = po.Schedule(stage, optimizer, nn.functional.cross_entropy, microbatches=2, scheduler=scheduler)

    def feed(call, x, y, **options):
        x, y = x.to(accelerator.device), y.to(accelerator.device)
        return call(*([x] if first else []), target=y if last else None, **options)

    for epoch in range(EPOCHS):
        for x, y in train:
            feed(pipe.step, x, y)  # instead of accelerator.backward(loss), optimizer.step(), scheduler.step(), zero_grad()
        pipe.drain()  # all stages at the same version: what is measured and saved belongs together
        losses = [feed(pipe.eval_step, x, y, drain=False) for x, y in held_out]
        loss = torch.stack(losses).mean() if last else torch.zeros((), device=accelerator.device)
        loss = accelerator.reduce(loss, "sum").item()  # from the last stage to all, so that the main process can log it
        accelerator.log({"validation/loss": loss, "lr": scheduler.get_last_lr()[0]}, step=epoch + 1)
        accelerator.print(f"epoch {epoch + 1}: validation loss {loss:.4f}", flush=True)
        accelerator.wait_for_everyone()
        torch.save(pipe.stage_state_dict(k), f"{folder}/stage-{k}.pt")
    pipe.close()
    accelerator.end_training()


if __name__ == "__main__":
    main()
