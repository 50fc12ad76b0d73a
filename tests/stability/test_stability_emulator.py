"""What the theory says, against the emulator with torch's own optimizers: it converges just below every bound and diverges just above.

All stages of a pipeline and all kinds of prediction are tested in one run: for each kind, stage k adds two weights of its own to columns
of their own, one with a curvature 5 % below what the theory allows at its gap, one 5 % above.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pipeoptim as po
from pipeoptim.rules import KINDS
from pipeoptim.stability import LINEAR_OPTIMIZERS, largest_stable_rate, linear_optimizer
from pipeoptim.stability.pipelines import linear_stages

LR, MARGIN, UPDATES = 0.1, 0.05, 320
HUGE = 1e12
"""As Adam's eps: second moments are then nothing beside it, and its step is that of an average of gradients."""

REAL = {
    "sgd": lambda p, decay: torch.optim.SGD(p, lr=LR),
    "momentum": lambda p, decay: torch.optim.SGD(p, lr=LR, momentum=decay),
    "nesterov": lambda p, decay: torch.optim.SGD(p, lr=LR, momentum=decay, nesterov=True),
    "adam": lambda p, decay: torch.optim.Adam(p, lr=LR * HUGE, betas=(decay, 0.999), eps=HUGE),
    "nadam": lambda p, decay: torch.optim.NAdam(p, lr=LR * HUGE, betas=(decay, 0.999), eps=HUGE, momentum_decay=1000.0),
}


class Columns(nn.Module):
    """Adds its weights, two for each kind of prediction, to its own of the columns."""

    def __init__(self, k, depth, kinds):
        super().__init__()
        self.weights = nn.ParameterList(torch.ones(2, dtype=torch.float64) for _ in range(kinds))
        self.place = (2 * kinds * k, 2 * kinds * (depth - 1 - k))

    def forward(self, z):
        return z + nn.functional.pad(torch.cat([self.what_counts(w) for w in self.weights]), self.place)

    def what_counts(self, weight):
        return weight


class BothPoints(Columns):
    """Weights of which a share d of the gradient comes through those that the backward uses."""

    d = 0.3

    def what_counts(self, weight):
        forwarded = (weight + 0.0).detach()  # computed from the forward's weights, so it is saved as it is
        return (1 + self.d) * forwarded * weight - self.d / 2 * weight.square()


def quadratic(z, h):
    return (h * z * z / 2).sum(1).mean()


def linear(z, h):
    return (h * z).sum(1).mean()


def check(name, decay, method, depth, m, kinds, stage=Columns, loss=quadratic, discrepancy=0.0):
    """Every weight below its bound shrinks, every one above it grows."""
    table, optimizer = po.METHODS[method], linear_optimizer(name, decay)
    models = [linear_stages(table, table.program(depth, m), optimizer, kind, discrepancy) for kind in kinds]
    bounds = [[largest_stable_rate(stages[k]) for stages in models] for k in range(depth)]
    sides = (1 - MARGIN, 1 + MARGIN)
    h = torch.tensor([side * bound / LR for row in bounds for bound in row for side in sides], dtype=torch.float64)
    pieces = [stage(k, depth, len(kinds)) for k in range(depth)]
    groups = [[{"params": [w], "prediction": kind} for w, kind in zip(p.weights, kinds, strict=True)] for p in pieces]
    # Groups may predict from the mini-batch in progress only where the pipeline does; refreshed as in the model, for every micro-batch.
    options = {"prediction": "in_progress", "refresh": 1} if "in_progress" in kinds else {}
    optimizers = [REAL[name](g, decay) for g in groups]
    pipe = po.Emulator(pieces, optimizers, lambda z, _: loss(z, h), method=method, microbatches=m, **options)
    x = torch.zeros(m, len(h), dtype=torch.float64)
    seen = []
    for _ in range(UPDATES):
        pipe.step(x, target=x)
        seen.append(torch.stack([torch.stack(list(piece.weights)).detach().abs() for piece in pieces]))
    size = torch.stack(seen)
    early, late = size[UPDATES // 4 : UPDATES // 2].amax(0), size[3 * UPDATES // 4 :].amax(0)
    # What has exploded has grown: far out, second moments are larger than any eps.
    growth = (late / early).where(size.amax(0) < 1e6, torch.inf)
    for k, row in enumerate(growth.tolist()):
        for kind, (below, above) in zip(kinds, row, strict=True):
            assert below < 0.95, f"stage {k}, {kind}: grows by {below} below the bound of {bounds[k]}"
            assert above > 1.05, f"stage {k}, {kind}: shrinks by {above} above the bound of {bounds[k]}"
    return bounds


@pytest.mark.parametrize("name", LINEAR_OPTIMIZERS)
def test_converges_just_below_the_bound_and_diverges_just_above(name):
    check(name, 0.0 if name == "sgd" else 0.8, "pipeoptim_stash", 4, 1, list(KINDS))


@pytest.mark.parametrize(("depth", "m"), [(3, 4), (4, 2)])
def test_with_several_micro_batches(depth, m):
    check("adam", 0.8, "pipeoptim", depth, m, list(KINDS))


@pytest.mark.parametrize(("method", "depth", "m"), [("pipedream", 8, 1), ("pipedream_2bw", 3, 4)])
def test_by_methods_that_do_not_predict(method, depth, m):
    check("momentum", 0.5, method, depth, m, ["none"])


@pytest.mark.parametrize("method", ["naive", "pipeoptim"])
def test_a_backward_on_the_latest_weights_is_what_the_discrepancy_says(method):
    bounds = check("momentum", 0.5, method, 4, 1, ["refined"], BothPoints, linear, BothPoints.d)
    table = po.METHODS[method]
    consistent = linear_stages(table, table.program(4, 1), linear_optimizer("momentum", 0.5), "refined")
    assert bounds[0][0] != pytest.approx(largest_stable_rate(consistent[0]), rel=0.05)  # or nothing would be tested
