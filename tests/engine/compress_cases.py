"""Runs with compressed messages, built alike by the emulator's test and by two processes: nested, uneven, scaled, interleaved."""

import torch
from torch import nn

import case
import pipeoptim as po

UPDATES = 14


class First(nn.Module):
    """Returns a tree with everything that a codec must tell apart, the second tensor channels-last."""

    def __init__(self):
        super().__init__()
        self.conv, self.lin = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(16, 40)

    def forward(self, x):
        flat = x.flatten(1)
        half = self.lin(flat).tanh().to(torch.float16)
        image = self.conv(x).to(memory_format=torch.channels_last)
        rest = (flat.argmax(1), None, "text", flat.double(), flat.detach()[:, :1])
        return {"image": image, "half": half, "rest": rest}


class Second(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.lin = nn.Conv2d(4, 2, 3), nn.Linear(49, 5)

    def forward(self, tree):
        best, _, _, double, column = tree["rest"]
        assert double.dtype == torch.float64 and tree["half"].dtype == torch.float16
        parts = [self.conv(tree["image"]).flatten(1), tree["half"].float(), best[:, None].float()]
        return self.lin(torch.cat([*parts, column - 1], 1)[:, :49]) + double.mean().float()


def nested():
    torch.manual_seed(5)
    return [First(), Second()]


def even():
    return [(x, y) for _, (x, y) in zip(range(UPDATES), case.batches(), strict=False)]


def uneven():
    """Mini-batches of other sizes, one of them a single row, which leaves a micro-batch empty."""
    sizes = [8, 8, 5, 8, 1, 8, 3, 8, 8, 2, 8, 8, 1, 8]
    return [(x[:size], y[:size]) for size, (x, y) in zip(sizes, even(), strict=True)]


def scaler():
    return torch.amp.GradScaler("cpu", init_scale=1024.0, growth_factor=3.0, growth_interval=3)


# name: modules, mini-batches, M, options
CASES = {
    "int8": (lambda: case.pieces(2), even, 1, {"compress": "int8"}),
    "bf16": (lambda: case.pieces(2), even, 2, {"compress": "bf16"}),
    "fed back": (lambda: case.pieces(2), even, 2, {"compress": po.Compression("bf16", "int8", "both"), "clip": 1.0}),
    "nested": (nested, uneven, 2, {"compress": po.Compression("int8", "int8", "both"), "uneven": True}),
    "autocast": (lambda: case.pieces(2), even, 1, {"compress": "int8", "autocast": torch.bfloat16}),
    "scaled": (lambda: case.pieces(2), even, 1, {"compress": po.Compression("int8", "int8", "gradients"), "scaler": scaler}),
    "interleaved": (lambda: case.pieces(4), even, 2, {"compress": po.Compression("int8", "int8", "gradients")}),
}


def optimizer(module):
    return torch.optim.AdamW(module.parameters(), lr=0.01)


def train(pipe, feed, batches):
    """All of a case on either engine; ``feed(x, y)`` gives the arguments. Returns the losses."""
    losses = []
    for n, (x, y) in enumerate(batches):
        args, target = feed(x, y)
        losses.append(pipe.step(*args, target=target))
        if n == 6:
            losses.append(pipe.eval_step(*args, target=target))
    pipe.drain()
    return losses
