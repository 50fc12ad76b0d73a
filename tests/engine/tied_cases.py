"""Small models with weights on several stages, made alike by the emulator's test and by one process per stage."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import pipeoptim as po

DEPTH, UPDATES, BATCH, VOCABULARY, WIDTH = 3, 14, 6, 11, 5
DRAIN_AT, EVALUATE_AT = 7, 10
ENDS = [[(0, "embed.weight"), (2, "head.weight")]]
MIDDLE = [[(0, "mix.weight"), (1, "mix.weight"), (2, "mix.weight")]]
INNER = [[(0, "mix.weight"), (1, "mix.weight")], ENDS[0]]


@dataclass(frozen=True)
class Case:
    """What differs between two runs."""

    method: str = "pipeoptim"
    m: int = 1
    tied: Any = field(default_factory=lambda: ENDS)
    optimizer: str = "adamw"
    clip: po.Clip | None = None
    dtype: torch.dtype = torch.float32
    overlap: bool = False
    trace: bool = False


CASES = {
    "pipeoptim": Case(),
    "naive": Case("naive", 2, trace=True),
    "flush": Case("1f1b", 2),
    "three": Case("pipedream", 1, MIDDLE),
    "two": Case("spectrain", 2, INNER, "sgd"),
    "clip": Case("pipeoptim", 3, INNER, clip=po.Clip(0.3, "global")),
    "clip_flush": Case("gpipe", 2, MIDDLE, "sgd", po.Clip(0.3, "global")),
    "masters": Case("pipeoptim_stash", 2, dtype=torch.bfloat16),
    "overlap": Case("pipeoptim", 2, INNER, overlap=True),
}


class Stage(nn.Module):
    """The first embeds, the last has a head; in between a mixture and dropout."""

    def __init__(self, k, depth=DEPTH):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH) if k == 0 else None
        self.mix, self.drop = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False) if k == depth - 1 else None

    def forward(self, x):
        x = x if self.embed is None else self.embed(x)
        x = torch.tanh(self.drop(self.mix(x)))
        return x if self.head is None else self.head(x)


def stage(case, k):
    """Module, optimizer and scheduler of stage k; each stage is made from its own seed, so copies do not begin alike."""
    torch.manual_seed(20 + k)
    module = Stage(k).to(case.dtype)
    params = module.parameters() if case.dtype == torch.float32 else po.master_weights(module)
    make = {"adamw": torch.optim.AdamW, "sgd": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, weight_decay=0.01)}
    optimizer = make[case.optimizer](params, lr=0.02)
    return module, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, UPDATES)


def batches():
    g = torch.Generator().manual_seed(1)
    for _ in range(UPDATES):
        yield torch.randint(VOCABULARY, (BATCH,), generator=g), torch.randint(VOCABULARY, (BATCH,), generator=g)


def loss_fn(output, target):
    return nn.functional.cross_entropy(output.float(), target)


def options(case):
    more = {"overlap": True} if case.overlap else {}
    return {"clip": case.clip, "tied": case.tied, "seed": 3, "trace": po.Trace() if case.trace else None, **more}


def train(pipe):
    """MicroBatch a case to ``pipe``; what its local stages end with."""
    first, last = 0 in pipe.local_stages, DEPTH - 1 in pipe.local_stages
    losses, norms = [], {k: [] for k in pipe.local_stages}
    for n, (x, y) in enumerate(batches()):
        args, target = ([x] if first else []), y if last else None
        losses.append(pipe.step(*args, target=target))
        for k in pipe.local_stages:
            norms[k].append((pipe.version(k), pipe.grad_norm(k)))
        if n == DRAIN_AT:
            pipe.drain()
        if n == EVALUATE_AT:
            losses.append(pipe.eval_step(*args, target=target, drain=False))
    pipe.drain()
    return {
        k: {"state": pipe.stage_state_dict(k), "norms": norms[k], "losses": losses if k == DEPTH - 1 else []}
        for k in pipe.local_stages
    }
