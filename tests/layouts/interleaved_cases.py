"""What the interleaved processes and the emulator both run."""

from itertools import islice

import torch

import case
import pipeoptim as po


def runs():
    """(method as :func:`case.predicted` reads it, M, optimizer, overlap)"""
    able = [
        m for m, x in sorted(po.METHODS.items()) if x.order == "async_1f1b" and x.forward.any_order and x.backward.any_order
    ]
    plain = [(method, m, name, False) for method in able for m, name in ((1, "adamw"), (4, "sgd"))]
    in_progress = [
        ("pipeoptim/1", 4, "adamw", False),
        ("pipeoptim_stash/2", 8, "sgd", False),
        ("pipeoptim/1", 2, "adamw", True),
    ]
    return [*plain, ("pipeoptim", 1, "adamw", True), ("pipeoptim", 2, "sgd", True), *in_progress]


DIFFERENT = {
    "prediction": "paper",
    "clip": 2.0,
    "autocast": torch.bfloat16,
    "uneven": True,
    "overlap": True,
    "compress": "int8",
}
"""Options that all processes must agree on, with a value that is not what :func:`setup` of the worker gives."""


def batches():
    return islice(case.batches(), 16)
