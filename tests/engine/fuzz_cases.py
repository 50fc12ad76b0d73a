"""Random small pipelines, drawn from a seed, so that every process can build its own stage and the emulator all of them.

Between two stages there is a random tree of tensors that carry gradients, detached ones, masks, integer ids, None and plain
values; some leaves come and go with the number of rows. Rows and sequence length change from step to step, or do not. Stages add
losses of their own, recompute parts of themselves, or are compiled; they may live two on a process, or have replicas.

Two replicas equal one pipeline bit for bit when the first one's loss counts twice, which is exact, and the second one's not at all:
the mean of their gradients is then the gradient of the one. Without averaging, both would differ.
"""

import hashlib
import random
from collections import namedtuple
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves
from torch.utils.checkpoint import checkpoint

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
        self.adds = f"stage {k}" if k in case.adding else None
        self.recomputes = k in case.recomputing
        self.factor = 1.0

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
        h = self.norm(h)
        h = checkpoint(self.after, h, use_reentrant=False) if self.recomputes else self.after(h)
        if self.adds:
            po.add_loss(self.adds, self.factor * h.square().mean())
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
    layout: str = ""

    def __post_init__(self):
        rng = random.Random(self.seed)
        able = [m for m, x in po.METHODS.items() if x.order == "async_1f1b" and x.forward.any_order and x.backward.any_order]
        self.method = rng.choice(sorted(able if self.layout == "interleaved" else po.METHODS))
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
        if po.METHODS[self.method].compensation is not None and self.optimizer == "rmsprop":
            self.optimizer = "sgd"  # spike compensation has no formula for RMSprop
        self.drain_at = rng.randrange(self.steps)
        self.eval_at = rng.randrange(self.steps)
        self.with_kwargs = [k for k in range(self.depth) if rng.random() < 0.3]
        self.adding = [k for k in range(self.depth) if rng.random() < 0.2]
        self.recomputing = [k for k in range(self.depth) if rng.random() < 0.2]
        self.recompute = rng.choice(("forward", "backward"))
        self.compiled = COMPILED.get(self.seed)
        if self.compiled:  # what a compiler would be asked to do again and again is drawn by the other cases
            self.changing, self.uneven, self.recompute, self.adding, self.recomputing = False, False, "backward", [], []
            self.structures = [("grad", 3)] * self.depth
        self.compress = rng.choice((None, None, "bf16", "int8", po.Compression("int8", "bf16", "both")))
        if self.compiled or self.layout == "replicas":  # replicas are compared with an exact oracle
            self.compress = None

    def module(self, k):
        torch.manual_seed(1000 * self.seed + k)
        if self.kinds[k] == "plain":
            return Plain()
        block = Block(self, k).requires_grad_(self.kinds[k] != "frozen")
        return torch.compile(block, backend=self.compiled) if self.compiled else block

    def make_optimizer(self, module):
        params = [p for p in module.parameters() if p.requires_grad]
        if not params:
            return None
        if self.optimizer == "sgd":
            return torch.optim.SGD(params, lr=0.05, momentum=0.9)
        return torch.optim.AdamW(params, lr=0.01) if self.optimizer == "adamw" else torch.optim.RMSprop(params, lr=0.005)

    def options(self):
        options = {"method": self.method, "microbatches": self.m, "seed": self.seed, "uneven": self.uneven}
        return options | {"recompute": self.recompute, "compress": self.compress}

    @property
    def processes(self):
        """Of one pipeline."""
        return self.depth // 2 if self.layout == "interleaved" else self.depth

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

    def train(self, pipe, factor=1.0):
        """MicroBatch the run to ``pipe``, whose losses are ``factor`` times what they should be; one digest per stage that lives there."""
        losses, parts = [], []
        for n, (x, y, extra) in enumerate(self.batches()):
            args = [x] if 0 in pipe.local_stages else []
            losses.append(pipe.step(*args, target=y, stage_kwargs=extra))
            if n == self.eval_at:
                losses.append(pipe.eval_step(*args, target=y, stage_kwargs=extra, drain=False))
            parts.append(pipe.loss_parts)
            if n == self.drain_at:
                pipe.drain()
        pipe.drain()
        if self.depth - 1 in pipe.local_stages:
            losses = [loss / factor for loss in losses]
        return {
            k: self.digest(k, pipe, losses, [p[f"stage {k}"] / factor for p in parts if f"stage {k}" in p])
            for k in pipe.local_stages
        }

    def digest(self, k, pipe, losses, parts):
        state = pipe.stage_state_dict(k)
        state["random"].pop("replicas", None)
        return digest([state, parts, losses if k == self.depth - 1 else []])


def loss_fn(output, target):
    return nn.functional.mse_loss(output, target)


#: seed -> backend: compiling takes as long as fifty other cases
COMPILED = {33: "eager", 44: "aot_eager"}


def digest(tree):
    """A fingerprint of every bit of every tensor and value in ``tree``."""
    found = hashlib.sha1()
    for value in tree_leaves(tree):
        if isinstance(value, torch.Tensor):
            found.update(f"{value.dtype}{tuple(value.shape)}".encode())
            plain = value.detach() + 0 if value.is_floating_point() else value.detach()  # -0.0 and 0.0 are equal
            found.update(plain.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(value).encode())
    return found.hexdigest()


def rounds(count):
    """``count`` cases in rounds that keep four processes busy: per round, (its processes, the case) of each pipeline."""
    layouts = (
        ("", (4,)),
        ("", (4,)),
        ("", (2, 2)),
        ("", (2, 2)),
        ("", (1, 3)),
        ("", (3, 1)),
        ("interleaved", (4, 4)),
        ("replicas", (2,)),
    )
    seed = 0
    while seed < count:
        (layout, cut), row, first = random.Random(f"round {seed}").choice(layouts), [], 0
        for depth in cut:
            case = Case(seed, depth, layout)
            ranks = tuple(range(first, first + case.processes)) if layout != "replicas" else (0, 1, 2, 3)
            row.append((ranks, case))
            first, seed = first + len(ranks), seed + 1
        yield row
