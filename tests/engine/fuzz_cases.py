"""Random small pipelines, drawn from a seed, so that every process can build its own stage and the emulator all of them.

Between two stages there is a random tree of tensors that carry gradients, detached ones, masks, integer ids, None and plain
values; some leaves come and go with the number of rows. Rows and sequence length change from step to step, or do not.
"""

import hashlib
import random
from collections import namedtuple
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves

import pipeoptim as po

WIDTHS = (2, 3, 5)
LEAVES = ("grad", "grad", "grad", "detached", "mask", "ids", "none", "number", "text", "sometimes", "empty")
Pair = namedtuple("Pair", "first second")


def leaf(rng):
    return rng.choice(LEAVES), rng.choice(WIDTHS)


def structure(rng, levels=2):
    """A description of what a stage returns: nested containers of leaves."""
    kind = rng.choice(("leaf", "tuple", "list", "dict", "pair")) if levels else "leaf"
    if kind == "leaf":
        return leaf(rng)
    if kind == "pair":
        return Pair(structure(rng, levels - 1), structure(rng, levels - 1))
    children = [structure(rng, levels - 1) for _ in range(rng.randint(1, 3))]
    if kind == "dict":
        return {f"key{n}" if rng.random() < 0.8 else n: child for n, child in enumerate(children)}
    return tuple(children) if kind == "tuple" and not is_leaf(tuple(children)) else list(children)


def with_a_gradient(rng):
    while True:
        drawn = structure(rng)
        if any(kind == "grad" for kind, _ in leaves_of(drawn)[0]):
            return drawn


def is_leaf(node):
    return type(node) is tuple and len(node) == 2 and isinstance(node[0], str)


def leaves_of(node):
    return tree_flatten(node, is_leaf=is_leaf)


class Block(nn.Module):
    """Mixes whatever tensors it is given into a hidden state, and returns it in its own structure."""

    def __init__(self, case, k):
        super().__init__()
        rng = random.Random(f"{case.seed} block {k}")
        self.returns = case.structures[k]
        self.hidden = rng.choice(WIDTHS)
        self.takes = nn.ModuleDict({str(w): nn.Linear(w, self.hidden) for w in WIDTHS})
        self.embed = nn.Embedding(7, self.hidden)
        self.norm = rng.choice((nn.Identity, nn.Identity, lambda: nn.LayerNorm(self.hidden), lambda: Norm(self.hidden)))()
        self.after = nn.Sequential(
            nn.Linear(self.hidden, self.hidden, bias=rng.random() < 0.5),
            rng.choice((nn.Tanh, lambda: nn.ReLU(inplace=True), nn.Identity))(),
            nn.Dropout(rng.choice((0.0, 0.3))),
        )
        self.gives = nn.ModuleDict({str(w): nn.Linear(self.hidden, w, bias=False) for w in WIDTHS})

    def forward(self, *args, **kwargs):
        values = tree_leaves((args, kwargs))
        rows, length = next((tuple(v.shape[:2]) for v in values if isinstance(v, torch.Tensor) and v.dim() > 1), (1, 2))
        h = torch.zeros(rows, length, self.hidden)
        for value in values:
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
                h = h + self.takes[str(value.shape[-1])](value)
            elif isinstance(value, torch.Tensor) and value.dtype is torch.bool:
                h = h * value.unsqueeze(-1)
            elif isinstance(value, torch.Tensor) and value.numel():
                h = h + self.embed(value)
            elif isinstance(value, (int, float)):
                h = h + 0.1 * value
        h = self.after(self.norm(h))
        found, spec = leaves_of(self.returns)
        return spec.unflatten([self.give(kind, width, h) for kind, width in found])

    def give(self, kind, width, h):
        out = self.gives[str(width)](h)
        return {
            "grad": lambda: out,
            "detached": lambda: out.detach(),
            "mask": lambda: out[..., 0] > 0,
            "ids": lambda: out.argmax(-1),
            "none": lambda: None,
            "number": lambda: h.shape[1] / 8,
            "text": lambda: "a word",
            "sometimes": lambda: out.transpose(0, 1).contiguous().transpose(0, 1) if h.shape[0] % 2 else None,
            "empty": lambda: out[..., :0],
        }[kind]()


class Norm(nn.BatchNorm1d):
    """BatchNorm over rows and positions, which has at least two of them."""

    def forward(self, x):
        return super().forward(x.flatten(0, 1)).view_as(x)


class Plain(nn.Module):
    """A stage without parameters."""

    def forward(self, *args, **kwargs):
        found = [v for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor) and v.numel()]
        first = next((v for v in found if v.is_floating_point()), None)
        return (found[0] / 7).unsqueeze(-1).expand(-1, -1, 2) if first is None else first.sin()


@dataclass
class Case:
    """One pipeline and the run that is made with it, all drawn from ``seed``."""

    seed: int
    depth: int

    def __post_init__(self):
        rng = random.Random(self.seed)
        self.method = rng.choice(sorted(po.METHODS))
        self.m = rng.randint(1, 4)
        if po.METHODS[self.method].at_least_depth_microbatches:
            self.m = max(self.m, self.depth)
        self.structures = [with_a_gradient(rng) for _ in range(self.depth - 1)] + [("grad", 3)]
        self.kinds = [rng.choice(("block", "block", "block", "block", "frozen", "plain")) for _ in range(self.depth)]
        self.kinds[-1] = "block"
        self.ids = rng.random() < 0.4
        self.uneven = rng.random() < 0.5
        self.changing = rng.random() < 0.7
        self.steps = rng.randint(2, 2 + self.depth) if self.depth < 3 else rng.randint(3, 1 + self.depth)
        self.optimizer = rng.choice(("sgd", "adamw", "rmsprop"))
        self.drain_at = rng.randrange(self.steps)
        self.eval_at = rng.randrange(self.steps)
        self.with_kwargs = [k for k in range(self.depth) if rng.random() < 0.3]
        self.compress = rng.choice((None, None, "bf16", "int8", po.Compression("int8", "bf16", "both")))

    def module(self, k):
        torch.manual_seed(1000 * self.seed + k)
        if self.kinds[k] == "plain":
            return Plain()
        return Block(self, k).requires_grad_(self.kinds[k] != "frozen")

    def make_optimizer(self, module):
        params = [p for p in module.parameters() if p.requires_grad]
        if not params:
            return None
        if self.optimizer == "sgd":
            return torch.optim.SGD(params, lr=0.05, momentum=0.9)
        return torch.optim.AdamW(params, lr=0.01) if self.optimizer == "adamw" else torch.optim.RMSprop(params, lr=0.005)

    def options(self):
        shared = {"method": self.method, "microbatches": self.m, "seed": self.seed}
        return {**shared, "uneven": self.uneven, "compress": self.compress}

    def batches(self):
        rng, g = random.Random(f"{self.seed} data"), torch.Generator().manual_seed(self.seed)
        rows, length = rng.randint(1, 3) * self.m, rng.randint(2, 4)
        for _ in range(self.steps):
            if self.changing:
                rows, length = rng.randint(1, 7) if self.uneven else rng.randint(1, 2) * self.m, rng.randint(2, 4)
            x = torch.randint(7, (rows, length), generator=g) if self.ids else torch.randn(rows, length, 2, generator=g)
            y = torch.randn(rows, length, 3, generator=g)
            extra = {k: {"extra": torch.randn(rows, length, 5, generator=g), "scale": 0.5} for k in self.with_kwargs}
            yield x, y, extra

    def train(self, pipe):
        """Feed the run to ``pipe``; one digest per stage that lives there."""
        losses = []
        for n, (x, y, extra) in enumerate(self.batches()):
            args = [x] if 0 in pipe.local_stages else []
            losses.append(pipe.step(*args, target=y, stage_kwargs=extra))
            if n == self.eval_at:
                losses.append(pipe.eval_step(*args, target=y, stage_kwargs=extra, drain=False))
            if n == self.drain_at:
                pipe.drain()
        pipe.drain()
        last = self.depth - 1
        return {k: digest([pipe.stage_state_dict(k), losses if k == last else []]) for k in pipe.local_stages}


def loss_fn(output, target):
    return nn.functional.mse_loss(output, target)


def digest(tree):
    """A fingerprint of every bit of every tensor and value in ``tree``."""
    found = hashlib.sha1()
    for value in tree_leaves(tree):
        if isinstance(value, torch.Tensor):
            found.update(f"{value.dtype}{tuple(value.shape)}".encode())
            found.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(value).encode())
    return found.hexdigest()


def rounds(count):
    """``count`` cases in rounds that keep four processes busy: per round, (first process, case) of each pipeline."""
    seed = 0
    while seed < count:
        rng = random.Random(f"round {seed}")
        cut, row = rng.choice(((4,), (4,), (2, 2), (1, 3), (3, 1))), []
        for depth in cut:
            row.append((sum(c.depth for _, c in row), Case(seed, depth)))
            seed += 1
        yield row
