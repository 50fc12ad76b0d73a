"""A naive oracle: keeps every version of every stage's weights in a list and looks the right ones up by number.

Written without anything of the library. A stage is a few layers ``y = tanh(x W' + b)`` whose gradients are spelled out by hand,
so that the activations of one set of weights can be combined with the weights of another, as an asynchronous pipeline does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil

import torch


@dataclass
class OracleStage:
    weights: list  # version -> list of tensors [W1, b1, W2, b2, ...]
    directions: list = field(default_factory=lambda: [None])  # version -> the step that led there, without lr
    state: dict = field(default_factory=dict)
    v: list = field(default_factory=list)  # version -> smoothed gradient, and so on
    m: list = field(default_factory=list)
    delta: list = field(default_factory=list)
    gamma: float = 0.0  # of delta
    states: list = field(default_factory=lambda: [{}])  # version -> the optimizer's state
    gradients: list = field(
        default_factory=list
    )  # micro-batch since the last (re)start -> its part of the update's, and its share

    def __post_init__(self):
        zeros = [torch.zeros_like(w) for w in self.weights[0]]
        self.v, self.m, self.delta = [zeros], [zeros], [zeros]

    def note(self, grads, new):
        """Append what the methods smooth, after an update by ``grads`` to the weights ``new``."""
        old = self.weights[-1]
        self.v.append([0.9 * a + 0.1 * g for a, g in zip(self.v[-1], grads, strict=True)])
        self.m.append([0.999 * a + 0.001 * g * g for a, g in zip(self.m[-1], grads, strict=True)])
        change = zip(self.delta[-1], new, old, strict=True)
        self.delta.append([self.gamma * d + (1 - self.gamma) * (a - b) for d, a, b in change])
        self.weights.append(new)

    def note_nothing(self):
        """An update that leaves all as it is, counted like any other."""
        for versions in (self.weights, self.directions, self.v, self.m, self.delta, self.states):
            versions.append(versions[-1])


@dataclass
class Use:
    """A micro-batch on a stage: which one, and how many updates the stage had at its F and at its B."""

    stage: OracleStage
    k: int
    depth: int
    micro: int
    i: int
    start: int  # updates at the last (re)start
    at_f: int
    at_b: int
    slack: float | tuple = 0

    @property
    def gap(self):
        return self.at_b - self.at_f


def ahead(k, depth, slack=0):
    """Forwards of stage k before its first backward, besides that of the same micro-batch."""
    each = slack if isinstance(slack, tuple) else (slack,) * (depth - 1)
    return ceil(sum((1 + Fraction(x) for x in each[k:]), Fraction(0)))


def updates_before_forward(i, k, depth, m, slack=0):
    return max(0, i - ahead(k, depth, slack)) // m


def forward(weights, x):
    kept = [x]
    for w, b in zip(weights[::2], weights[1::2], strict=True):
        x = torch.tanh(x @ w.T + b)
        kept.append(x)
    return x, kept


def backward(weights, kept, g):
    grads = []
    for n in reversed(range(len(weights) // 2)):
        g = g * (1 - kept[n + 1] ** 2)
        grads = [g.T @ kept[n], g.sum(0), *grads]
        g = g @ weights[2 * n]
    return g, grads


def mse_gradient(y, target):
    return 2 * (y - target) / y.numel()


class Rule:
    """An optimizer written by hand: ``step`` returns the direction d with W <- W - lr d; ``ahead`` what is predicted."""

    def __init__(self, name, lr=0.05, wd=0.0):
        self.name, self.lr, self.wd = name, lr, wd

    def step(self, stage, weights, grads):
        t = stage.state["t"] = stage.state.get("t", 0) + 1
        if self.name == "nadam":
            return self.torch_step(stage, weights, grads)
        if self.name in ("sgd", "momentum"):
            grads = [g + self.wd * w for g, w in zip(grads, weights, strict=True)]
            if self.name == "sgd":
                return grads
            old = stage.state.get("m")
            m = stage.state["m"] = grads if old is None else [0.9 * a + g for a, g in zip(old, grads, strict=True)]
            return m
        m = stage.state.get("m") or [torch.zeros_like(g) for g in grads]
        v = stage.state.get("v") or [torch.zeros_like(g) for g in grads]
        m = stage.state["m"] = [0.9 * a + 0.1 * g for a, g in zip(m, grads, strict=True)]
        v = stage.state["v"] = [0.999 * a + 0.001 * g * g for a, g in zip(v, grads, strict=True)]
        d = [(a / (1 - 0.9**t)) / ((b / (1 - 0.999**t)).sqrt() + 1e-8) for a, b in zip(m, v, strict=True)]
        return [x + self.wd * w for x, w in zip(d, weights, strict=True)]

    def torch_step(self, stage, weights, grads):
        """The direction that torch's own optimizer goes, on copies; its weights are checked not to drift from ours."""
        if "params" not in stage.state:
            stage.state["params"] = [w.clone().requires_grad_() for w in weights]
            stage.state["optimizer"] = self.torch(stage.state["params"])
        for p, w, g in zip(stage.state["params"], weights, grads, strict=True):
            p.data.copy_(w)
            p.grad = g
        stage.state["optimizer"].step()
        return [(w - p.detach()) / self.lr for p, w in zip(stage.state["params"], weights, strict=True)]

    def torch(self, params):
        if self.name == "nadam":
            return torch.optim.NAdam(params, lr=self.lr, betas=(0.99, 0.999))
        if self.name == "sgd":
            return torch.optim.SGD(params, lr=self.lr)
        if self.name == "momentum":
            return torch.optim.SGD(params, lr=self.lr, momentum=0.9, weight_decay=self.wd)
        return torch.optim.AdamW(params, lr=self.lr, weight_decay=self.wd)

    def ahead(self, stage, version):
        """The direction predicted to continue from ``version``: the last step, with the decay of today's weights."""
        d = stage.directions[version]
        if d is None:
            return [torch.zeros_like(w) for w in stage.weights[version]]
        if self.name == "adamw":
            before, now = stage.weights[version - 1], stage.weights[version]
            return [x + self.wd * (w - b) for x, w, b in zip(d, now, before, strict=True)]
        return d


def feed(pipe, batches, segments):
    """What :func:`train` does, on a real pipeline: segments of mini-batches with a drain after each. The losses."""
    losses, fed = [], iter(batches)
    for minibatches in segments:
        for _ in range(minibatches):
            x, y = next(fed)
            losses.append(pipe.step(x, target=y).item())
        pipe.drain()
    return losses


def train(
    initial,
    rule,
    segments,
    batches,
    m,
    forward_uses,
    backward_uses,
    rate=lambda k, version: 1.0,
    gammas=None,
    correct=None,
    clip=None,
    recompute=False,
    slack=0,
    skip=(),
):
    """Train a pipeline of ``len(initial)`` stages.

    Args:
        initial: per stage, its list of tensors.
        segments: numbers of mini-batches between two drains.
        m: micro-batches of a mini-batch, or a list with one number per segment.
        batches: list of (x, y), one per mini-batch, in order.
        forward_uses, backward_uses: a :class:`Use` -> list of tensors.
        rate: (k, version) -> factor on the learning rate of the next update.
        gammas: per stage, how slowly the average of weight changes forgets.
        correct: (k, stage, its weights, d, gradients) -> what is applied in place of d.
        recompute: whether a stage's activations are computed again, on the weights of its backward.
        slack: more micro-batches in flight, a number or one per boundary.
        skip: mini-batches whose updates leave everything as it is.
        clip: (t, gradients of all stages) -> those that update version t to t + 1.

    Returns:
        The stages, and the loss of every mini-batch.
    """
    depth = len(initial)
    stages = [OracleStage([weights]) for weights in initial]
    for k, gamma in enumerate(gammas or []):
        stages[k].gamma = gamma
    sums = [None] * depth
    losses, fed = [], iter(batches)
    each = m if isinstance(m, list) else [m] * len(segments)
    for minibatches, m in zip(segments, each, strict=True):
        start = len(stages[0].weights) - 1
        for stage in stages:
            stage.gradients = []
        for n in range(minibatches):
            x_all, y_all = next(fed)
            loss = 0.0
            for j, (x, y) in enumerate(zip(x_all.tensor_split(m), y_all.tensor_split(m), strict=True)):
                i, share = n * m + j, len(x) / len(x_all)
                if not share:
                    for stage in stages:
                        stage.gradients.append((None, 0.0))
                    continue
                kept, uses = [], []
                for k, stage in enumerate(stages):
                    at_f = start + updates_before_forward(i, k, depth, m, slack)
                    uses.append(Use(stage, k, depth, m, i, start, at_f, start + n, slack))
                    x, acts = forward(forward_uses(uses[k]), x)
                    kept.append(acts)
                loss += float(((x - y) ** 2).mean()) * share
                g = mse_gradient(x, y) * share
                for k in reversed(range(depth)):
                    weights = backward_uses(uses[k])
                    acts = forward(weights, kept[k][0])[1] if recompute else kept[k]
                    g, grads = backward(weights, acts, g)
                    stages[k].gradients.append((grads, share))
                    sums[k] = grads if sums[k] is None else [a + b for a, b in zip(sums[k], grads, strict=True)]
            losses.append(loss)
            if clip is not None:
                sums = clip(start + n, sums)
            for k, stage in enumerate(stages):
                now = stage.weights[-1]
                if start + n in skip:
                    stage.note_nothing()
                    sums[k] = None
                    continue
                lr = rule.lr * rate(k, len(stage.weights) - 1)
                d = rule.step(stage, now, sums[k])
                applied = d if correct is None else correct(k, stage, now, d, sums[k])
                stage.note(sums[k], [w - lr * x for w, x in zip(now, applied, strict=True)])
                stage.directions.append(d)
                stage.states.append(dict(stage.state))
                sums[k] = None
    return stages, losses
