"""A loop in the style of Lightning Fabric, over a StatefulDataLoader: it is saved in the middle of an epoch, and goes on from there.

Run it:  torchrun --nproc-per-node 2 examples/fabric_loop.py
"""

import os
import sys

import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers import CSVLogger
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

import pipeoptim as po

EPOCHS, BATCH, WIDTH, SAVED = 3, 32, 32, (1, 9)  # saved in epoch 1, after 9 of its batches


def build_stage(k: int, depth: int) -> nn.Module:
    layers = [*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(0.05)) for _ in range(5)), nn.Linear(WIDTH, 4)]
    return nn.Sequential(*layers[k * 6 // depth : (k + 1) * 6 // depth])


def data_set(size: int) -> TensorDataset:
    x = torch.randn(size, WIDTH, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, x.view(size, 4, -1).sum(-1).argmax(1))


class Trainer:
    def __init__(self, fabric: Fabric, folder: str) -> None:
        self.fabric, self.folder, self.k, self.depth = fabric, folder, fabric.global_rank, fabric.world_size
        # Not fabric.setup(), which wraps for data parallelism and deals out the batches: all processes draw the same ones.
        self.loader = StatefulDataLoader(data_set(20 * BATCH), BATCH, shuffle=True, generator=torch.Generator())
        module = build_stage(self.k, self.depth)
        stage = PipelineStage(module, self.k, self.depth, fabric.device)
        optimizer = torch.optim.AdamW(module.parameters(), lr=4e-3)
        self.pipe = po.Schedule(stage, optimizer, nn.functional.cross_entropy, microbatches=2)

    def train(self, start: int = 0, save: bool = True) -> None:
        for epoch in range(start, EPOCHS):
            self.loader.generator.manual_seed(epoch)  # an epoch's order depends on its number alone, also after a resumption
            losses = []  # of the last stage
            for n, batch in enumerate(self.loader, start=1):
                x, y = self.fabric.to_device(batch)
                loss = self.pipe.step(*([x] if self.k == 0 else []), target=y if self.k == self.depth - 1 else None)
                losses += [] if loss is None else [loss]
                if save and (epoch, n) == SAVED:
                    po.save_sharded(self.pipe, f"{self.folder}/saved")
                    self.fabric.save(f"{self.folder}/loader.ckpt", {"loader": self.loader.state_dict(), "epoch": epoch})
            last = torch.stack(losses)[-5:].mean() if losses else torch.zeros(())
            told = self.fabric.all_reduce(last, reduce_op="sum")  # from the last stage to all, so that the first can log it
            self.fabric.log_dict({"train/loss": told, "epoch": epoch + 1})
            self.fabric.print(f"epoch {epoch + 1}: loss {told:.6f}", flush=True)

    def resume(self) -> int:
        kept = self.fabric.load(f"{self.folder}/loader.ckpt")
        self.pipe.drain()
        po.load_sharded(self.pipe, f"{self.folder}/saved")
        self.loader.load_state_dict(kept["loader"])  # the next loop over it begins behind the batches that were drawn
        return kept["epoch"]


def main() -> None:
    folder = sys.argv[1] if len(sys.argv) > 1 else "runs/fabric"
    fabric = Fabric(accelerator="cpu", strategy="ddp", devices=int(os.environ["LOCAL_WORLD_SIZE"]), loggers=CSVLogger(folder))
    fabric.launch()
    fabric.seed_everything(0)
    trainer = Trainer(fabric, folder)
    trainer.train()
    trainer.train(trainer.resume(), save=False)  # once more, from the middle of epoch 2
    trainer.pipe.close()


if __name__ == "__main__":
    main()
