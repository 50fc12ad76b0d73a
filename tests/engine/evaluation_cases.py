"""What the emulator and the processes both evaluate."""

import torch
from torch import nn

import pipeoptim as po


class Scale(nn.Linear):
    """A stage that may be given a keyword."""

    def __init__(self, k):
        torch.manual_seed(k)
        super().__init__(3, 3, dtype=torch.float64)

    def forward(self, x, *, scale=None):
        x = torch.tanh(super().forward(x))
        return x if scale is None else x * scale


def loss_fn(output, target):
    errors = (output - target).square().mean(1)
    return {"loss": errors.mean(), "worst": errors.max(), "share": (errors > 1).double().mean()}


def weigh(target):
    return target[:, 0].abs().sum()


def stages(depth):
    return [Scale(k) for k in range(depth)]


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


def batches(sizes, seed=0, scaled=False):
    g = torch.Generator().manual_seed(seed)
    for n in sizes:
        x, y, scale = (torch.randn(n, 3, dtype=torch.float64, generator=g) for _ in range(3))
        yield (x, y, {1: {"scale": scale}}) if scaled else (x, y)


def train(pipe, stop=5):
    first, last = 0 in pipe.local_stages, pipe.depth - 1 in pipe.local_stages
    for x, y in batches([4] * stop, seed=1):
        pipe.step(*([x] if first else []), target=y if last else None)


# name -> options, sizes of the batches, whether a later stage is given keywords
CASES = {
    "rows": ({}, (6, 6, 3), False),
    "keywords": ({}, (2, 5), True),
    "weighed": ({"loss_weight": weigh}, (4, 4, 2), False),
}


def evaluations(make):
    """What a pipeline of ``make(options)`` finds, with everything in flight drained or not."""
    for options, sizes, scaled in CASES.values():
        pipe = make(options)
        for drain in (False, True):
            train(pipe)
            yield vars(pipe.evaluate(list(batches(sizes, scaled=scaled)), drain=drain))
        pipe.drain()
        pipe.close()


def plain(name, depth):
    """The same by hand, on the whole evaluation set in one piece, with the weights that training left: rows, loss and parts."""
    options, sizes, scaled = CASES[name]
    modules = stages(depth)
    train(pipe := po.Emulator(modules, sgd, loss_fn, "1f1b"))
    pipe.drain()
    found = []
    for x, y, *rest in batches(sizes, scaled=scaled):
        for k, module in enumerate(modules):
            x = module(x, **(rest[0].get(k, {}) if rest else {}))
        found.append((x.detach(), y, float(weigh(y)) if options else float(len(y))))
    total = sum(weight for *_, weight in found)
    values = [loss_fn(x, y) for x, y, _ in found]
    return {
        part: sum(float(value[part]) * weight for value, (*_, weight) in zip(values, found, strict=True)) / total
        for part in values[0]
    } | {"weight": total}
