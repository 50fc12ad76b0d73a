"""Runs with mini-batches that are not finite, built alike by the emulator's tests, by two processes and by plain loops."""

import math

import torch

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
}


def train(pipe, feed, m):
    losses = []
    for x, y in batches(m):
        args, target = feed(x, y)
        losses.append(pipe.step(*args, target=target))
    pipe.drain()
    return losses
