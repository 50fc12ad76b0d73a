"""A stage that has given up what was in flight, and loaded a state, goes on as a new one with that state does, bit for bit."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import pipeoptim as po
from pipeoptim.engine.processes.norm_exchange import LocalNormExchange
from pipeoptim.engine.stage.worker import StageWorker
from pipeoptim.options import PipelineOptions

DEPTH = 3
CUTS = (
    "after a forward",
    "with weights chosen",
    "in a mini-batch",
    "in a backward",
    "with an update begun",
    "in a forward",
    "at rest",
)


class Stage(nn.Module):
    """A linear layer with dropout and running statistics; fails where it is told to."""

    def __init__(self, k):
        super().__init__()
        torch.manual_seed(k)
        self.linear, self.norm, self.fails = nn.Linear(4, 4), nn.BatchNorm1d(4), False
        self.dropout = nn.Dropout(0.3)

    def forward(self, x):
        if self.fails:
            raise OverflowError("in the middle of a forward")
        return self.dropout(self.norm(self.linear(x)))


class Driven:
    """Stage ``k`` alone, fed with activations and gradients that depend on the micro-batch only."""

    def __init__(self, method, k, m, clip):
        module = Stage(k)
        program = po.get_method(method).program(DEPTH, m)
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.05)
        self.norms = LocalNormExchange(DEPTH) if clip is not None and clip.exchanges else None
        options = PipelineOptions(method, m, seed=3, clip=clip)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        self.worker = StageWorker(
            module,
            optimizer,
            po.get_method(method),
            program,
            k,
            nn.functional.mse_loss,
            scheduler=scheduler,
            options=options,
            norms=None if self.norms is None else self.norms.end(k),
        )
        self.program, self.k, self.m, self.seen = program, k, m, []

    def data(self, i, what):
        return torch.randn(6, 4, generator=torch.Generator().manual_seed(100 * i + what))

    def act(self, action):
        kind, i = action.kind.value, action.number
        if kind == "F":
            x = self.data(i, 0).requires_grad_(self.k > 0)
            self.seen.append(self.worker.forward(i, (x,), {}, self.data(i, 1)).detach().clone())
        elif kind == "B":
            gradients = [] if self.worker.is_last else [self.data(i, 2)]
            self.seen += [g.clone() for g in self.worker.backward(i, gradients) if g is not None]
        else:
            version = self.worker.weights.version
            for j in range(DEPTH) if self.norms is not None else ():
                if j != self.k:
                    self.norms.end(j).send(version, float(j + version))
            self.worker.update()
            for j in range(DEPTH) if self.norms is not None else ():
                if j != self.k and self.norms.can_receive(version):
                    self.norms.end(j).receive(version)

    def actions(self, minibatches):
        steps = [action for n in range(minibatches) for action in self.program.step(self.k, n)]
        return steps, self.program.drain(self.k, minibatches)

    def run(self, minibatches):
        steps, rest = self.actions(minibatches)
        for action in [*steps, *rest]:
            self.act(action)
        self.worker.finish_update()
        self.worker.restart()

    def leave(self, where):
        """Stop at a point at which something is in flight."""
        steps, _ = self.actions(5)
        kinds = [action.kind.value for action in steps]
        if where == "at rest":
            return
        if where in ("in a mini-batch", "in a backward"):
            last = max(n for n, kind in enumerate(kinds) if kind == "B")
            for action in steps[: last + (where == "in a mini-batch")]:
                self.act(action)
            if where == "in a backward":
                bad = [torch.ones(1)] if not self.worker.is_last else []
                self.worker._in_flight[steps[last].number].outputs[:] = [torch.ones(2, 2, requires_grad=True)]
                with pytest.raises(RuntimeError):
                    self.worker.backward(steps[last].number, bad)
            return
        last = max(n for n, kind in enumerate(kinds) if kind == ("U" if where == "with an update begun" else "F"))
        for action in steps[:last]:
            self.act(action)
        if where == "with an update begun":
            self.worker.update.announce()
        elif where == "after a forward":
            self.act(steps[last])
        else:
            self.worker.prepare(steps[last].number)
            if where == "in a forward":
                self.worker.module.fails = True
                with pytest.raises(OverflowError):
                    self.act(steps[last])
                self.worker.module.fails = False


def leaves(state):
    return [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in tree_leaves(state)]


def equal(one, other):
    return len(one) == len(other) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("where", CUTS)
@pytest.mark.parametrize(
    ("method", "m"),
    [(m, 1) for m in ("pipeoptim", "pipeoptim_stash", "pipedream", "naive")]
    + [("pipeoptim", 3), ("xpipe", 2), ("spectrain", 1), ("pipemare", 1), ("pipedream_2bw", 3), ("gpipe", 2), ("nesterov", 1)],
)
@pytest.mark.parametrize("k", range(DEPTH))
def test_after_abandon_and_load_a_stage_is_as_good_as_new(method, m, k, where):
    clip = po.Clip(0.5, "global_delayed") if (m + k) % 2 else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        used = Driven(method, k, m, clip)
        used.run(4)
        state = copy.deepcopy(used.worker.state_dict())
        used.leave(where)
        used.worker.abandon()
        used.worker.load_state_dict(copy.deepcopy(state))
        fresh = Driven(method, k, m, clip)
        fresh.worker.load_state_dict(copy.deepcopy(state))
        found = []
        for driven in (used, fresh):
            driven.seen.clear()
            driven.run(5)
            found.append([*driven.seen, *leaves(driven.worker.state_dict())])
    assert equal(*found)
