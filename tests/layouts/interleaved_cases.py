"""What the interleaved processes and the emulator both run."""

from itertools import islice

import torch

import case
import pipeoptim as po


def runs():
    """(method as :func:`case.predicted` reads it, M, optimizer, overlap, slack)"""
    able = [
        m for m, x in sorted(po.METHODS.items()) if x.order == "async_1f1b" and x.forward.any_order and x.backward.any_order
    ]
    plain = [(method, m, name, False, 0) for method in able for m, name in ((1, "adamw"), (4, "sgd"))]
    in_progress = [
        ("pipeoptim/1", 4, "adamw", False, 0),
        ("pipeoptim_stash/2", 8, "sgd", False, 0),
        ("pipeoptim/1", 2, "adamw", True, 0),
    ]
    overlapped = [("pipeoptim", 1, "adamw", True, 0), ("pipeoptim", 2, "sgd", True, 0)]
    slack = [("pipeoptim", 1, "adamw", False, 1), ("pipedream", 4, "sgd", False, 2), ("pipeoptim/1", 2, "sgd", True, 0.5)]
    return [*plain, *overlapped, *in_progress, *slack]


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
