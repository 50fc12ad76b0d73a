"""Layouts within layouts, each run by 4 processes and by the emulator with the whole batch."""

from dataclasses import dataclass

import torch
from torch import nn

import layout_cases
import pipeoptim as po


@dataclass(frozen=True)
class Case(layout_cases.Case):
    """``chunks`` stages on each of the processes of a pipeline; with ``wrap="hsdp"`` one stage on all four."""

    chunks: int = 2

    @property
    def depth(self):
        return 1 if self.wrap == "hsdp" else 2 * self.chunks

    @property
    def replicas(self):
        return 4 // self.processes

    @property
    def processes(self):
        """Of one pipeline."""
        return self.depth // self.chunks


CASES = [
    Case(),
    Case("pipeoptim_stash", 2, optimizer="sgd", clip=po.Clip(0.05, "stage")),
    Case("pipedream", 2, overlap=True),
    Case(wrap="ddp"),
    Case(wrap="fsdp"),
    Case("pipedream", 2, wrap="fsdp", optimizer="sgd", clip=po.AdaGC(lambda_abs=0.05, warmup=3)),
    Case(wrap="hsdp", chunks=1, overlap=True, clip=po.Clip(0.05, "stage")),  # predicts one update ahead
    Case("pipedream", 2, wrap="hsdp", chunks=1, overlap=True, optimizer="sgd"),
]


def share(case, batch, replica):
    """A part of each micro-batch of the whole batch."""
    return torch.cat([part.chunk(case.replicas)[replica] for part in batch.chunk(case.m)])


def emulate(case):
    modules = [layout_cases.module(case, k) for k in range(case.depth)]
    optimizers = [layout_cases.optimizer(case, module.parameters()) for module in modules]
    pipe = po.Emulator(
        modules,
        optimizers,
        nn.functional.mse_loss,
        case.method,
        case.m,
        schedulers=[layout_cases.scheduler(optimizer) for optimizer in optimizers],
        clip=case.clip,
        overlap=case.overlap,
        processes=case.processes,
    )
    losses = [pipe.step(x, target=y) for x, y in layout_cases.batches()]
    pipe.drain()
    return pipe, torch.stack(losses)
