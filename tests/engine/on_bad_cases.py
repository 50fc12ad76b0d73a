"""Runs with bad mini-batches, built alike by the emulator's tests, by two processes and by plain loops."""

import math

import torch
from torch import nn

import case
import pipeoptim as po

UPDATES = 24
BAD = {0: math.nan, 3: math.inf, 4: math.nan, 9: 1e6, 13: -math.inf, 20: math.nan, 23: math.nan}
"""Mini-batch -> what its first number is multiplied by; 1e6 is large and no more."""

SKIPPED = [n for n, factor in BAD.items() if not math.isfinite(factor)]


def batches(m=1):
    """The bad number is in the second of two micro-batches every other time."""
    for n, (x, y) in zip(range(UPDATES), case.batches(), strict=False):
        if n in BAD:
            x = x.clone()
            x[(n % m) * len(x) // m, 0, 1, 1] = BAD[n]
        yield x, y


FACTORS = [math.nan, math.inf, 1e6, -math.inf, math.nan]
SCARS = {n: FACTORS[i % 5] for i, n in enumerate([0, 1, 4, 7, 11, 12, 13, 31, 32, 34, 36, 37, 40, 41, 44, 45, 46, 47, 49, 51])}
"""Twenty of a regression's mini-batches; those from 31 on may be large, as the losses before them are enough to tell."""
SCARS[4] = SCARS[13] = math.inf
OUTLIER = 8.0


def regression(m=1, scars=None):
    g = torch.Generator().manual_seed(5)
    for n in range(54):
        x = torch.randn(8, 6, generator=g)
        y = x[:, :3].relu() + 0.3 * torch.randn(8, 3, generator=g)
        factor = (SCARS if scars is None else scars).get(n)
        if factor is not None:
            x[(n % m) * len(x) // m, 0] = factor
        yield x, y


def regressors(depth):
    torch.manual_seed(4)
    parts = [nn.Sequential(nn.Linear(6, 12), nn.ReLU())] + [
        nn.Sequential(nn.Linear(12, 12), nn.ReLU()) for _ in range(depth - 2)
    ]
    return [*parts, nn.Linear(12, 3)] if depth > 1 else [nn.Sequential(*parts, nn.Linear(12, 3))]


def scaler():
    return torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=4)


ADAGC = {"lambda_rel": 1.05, "lambda_abs": 0.5, "beta": 0.9, "warmup": 5}

# name: modules, processes, method, M, options
CASES = {
    "pipeoptim": (2, "pipeoptim", 1, {}),
    "in_progress": (2, "pipeoptim", 2, {"prediction": "in_progress", "clip": po.AdaGC(**ADAGC)}),
    "stashed": (2, "pipedream", 2, {"clip": 1.0}),
    "flushed": (2, "1f1b", 2, {"scaler": scaler}),
    "interleaved": (4, "pipeoptim", 2, {}),
    "outliers": (2, "pipeoptim_stash", 2, {"outlier": OUTLIER, "scaler": scaler}),
}


def pieces(name):
    """Modules and loss."""
    if name == "outliers":
        return regressors(2), nn.functional.mse_loss
    return case.pieces(CASES[name][0]), case.loss_fn


def skipped(name):
    return list(SCARS) if name == "outliers" else SKIPPED


def train(pipe, feed, m, name=""):
    losses = []
    for x, y in regression(m) if name == "outliers" else batches(m):
        args, target = feed(x, y)
        losses.append(pipe.step(*args, target=target))
    pipe.drain()
    return losses
