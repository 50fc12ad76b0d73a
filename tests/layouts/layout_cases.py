"""Runs that are made twice: by 2 stages x 2 replicas on 4 processes, and by the emulator with the doubled batch."""

from dataclasses import dataclass

import torch
from torch import nn

import pipeoptim as po

DEPTH, REPLICAS, UPDATES, BATCH, WIDTH = 2, 2, 9, 4, 6  # BATCH: per replica


@dataclass(frozen=True)
class Case:
    """What differs between two runs."""

    method: str = "pipeoptim"
    m: int = 1
    wrap: str = ""  # "", "ddp" or "fsdp"
    clip: po.Clip | po.AdaGC | None = None
    optimizer: str = "adamw"
    odd: bool = False  # a module that leaves parameters without a gradient, and shares others
    overlap: bool = False
    prediction: str = "refined"
    tied: bool = False  # the first layers of both stages

    def name(self) -> str:
        clip = "" if self.clip is None else getattr(self.clip, "scope", "adagc")
        return f"{self.method}-{self.m}-{self.wrap}-{clip}-{self.optimizer}-{self.odd}-{self.overlap}-{self.prediction}-{self.tied}"


class Odd(nn.Module):
    """Chooses a layer by the sign of its input's sum, uses another one twice, and never uses the third."""

    def __init__(self):
        super().__init__()
        self.either = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.never = nn.Linear(WIDTH, WIDTH)
        self.twice = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        parts = [self.either[int(row.sum() > 0)](row) for row in x]
        return torch.tanh(self.twice(torch.tanh(self.twice(torch.stack(parts)))))


def module(case: Case, k: int) -> nn.Module:
    torch.manual_seed(10 + k)
    first = [Odd()] if case.odd and k == 0 else []
    layers = [layer for _ in range(2) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    return nn.Sequential(*first, *layers, nn.Linear(WIDTH, WIDTH)).double()


def optimizer(case: Case, params) -> torch.optim.Optimizer:
    if case.optimizer == "sgd":
        return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01)
    return torch.optim.AdamW(params, lr=0.01)


def scheduler(opt):
    return torch.optim.lr_scheduler.CosineAnnealingLR(opt, UPDATES)


def batches():
    g = torch.Generator().manual_seed(1)
    for _ in range(UPDATES):
        yield (
            torch.randn(BATCH * REPLICAS, WIDTH, generator=g, dtype=torch.float64),
            torch.randn(BATCH * REPLICAS, WIDTH, generator=g, dtype=torch.float64),
        )


def spoiled():
    """The batches; in the third a sample of the first replica is not a number, in the fifth one of the last."""
    for n, (x, y) in enumerate(batches()):
        if n in (2, 4):
            x = x.clone()
            x[0 if n == 2 else -1, 0] = torch.nan
        yield x, y


def share(batch: torch.Tensor, m: int, replica: int) -> torch.Tensor:
    """The samples of one replica: a half of each micro-batch of the doubled batch."""
    return torch.cat([part.chunk(REPLICAS)[replica] for part in batch.chunk(m)])


def emulate(case: Case) -> tuple[po.Emulator, torch.Tensor]:
    """The reference: one pipeline, the doubled batch."""
    modules = [module(case, k) for k in range(DEPTH)]
    opts = [optimizer(case, mod.parameters()) for mod in modules]
    rates = [scheduler(opt) for opt in opts]
    options = {"overlap": True} if case.overlap else {}
    if case.tied:
        options["tied"] = TIED
    pipe = po.Emulator(
        modules,
        opts,
        nn.functional.mse_loss,
        case.method,
        case.m,
        schedulers=rates,
        clip=case.clip,
        seed=3,
        prediction=case.prediction,
        **options,
    )
    losses = []
    for n, (x, y) in enumerate(batches()):
        losses.append(pipe.step(x, target=y))
        if n == 5:
            losses.append(pipe.eval_step(x, target=y))
    pipe.drain()
    return pipe, torch.stack(losses)


TIED = [[(0, "0.weight"), (1, "0.weight")]]
CLIPS = [po.Clip(0.05), po.Clip(0.05, "global"), po.Clip(0.05, "global_delayed")]
ODD = [Case(odd=True, optimizer=o, m=m) for o, m in (("adamw", 1), ("sgd", 2))]


def plain() -> list[Case]:
    """Every method, every clipping, and modules that are hard to average."""
    return [
        *(Case(method, 2) for method in sorted(po.METHODS)),  # M = 2 has micro-batches with a gap and without one
        *(Case(method) for method in ("pipeoptim", "pipedream")),
        *(Case(clip=clip, m=2, optimizer="sgd") for clip in CLIPS),
        *ODD,
        Case(overlap=True),
        Case("pipedream", 2, overlap=True),
        *(Case(tied=True, m=m, overlap=overlap) for m, overlap in ((1, False), (2, True))),
        Case("1f1b", 2, tied=True, clip=CLIPS[1], optimizer="sgd"),
    ]


def wrapped() -> list[Case]:
    """What can differ when torch's wrapper averages: micro-batches, other backward weights, clipping, odd modules."""
    return [Case(), Case("spectrain", 2), Case(clip=CLIPS[1], m=2), Case(tied=True, m=2), *ODD]


def sharded() -> list[Case]:
    """Where the weights of F and B come from: latest, predicted by each kind, stashed, numbered; clipping."""
    return [
        *(Case(method, 2) for method in ("gpipe", "naive", "pipedream", "pipedream_2bw", "pipeoptim", "pipeoptim_stash")),
        *(Case(clip=clip, m=2, optimizer="sgd") for clip in CLIPS[:2]),
        *(Case(optimizer=o, prediction=p) for o, p in (("adamw", "displacement"), ("adamw", "refined"), ("sgd", "paper"))),
    ]
