"""One row per optimizer setting, with what its rule claims; every rules test iterates this table or the registry."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pipeoptim.optim import RotatedAdam
from pipeoptim.rules import PartialGradient

SHAPES = ((4, 3), (5,), (2, 3, 2, 2))
MATRICES = ((4, 3), (3, 6))


@dataclass(frozen=True)
class Case:
    """An optimizer setting. `repeats`: the prediction equals the last displacement. `exact`: largest s for which it
    equals real steps under a gradient that was constant from the first update on (0: claims nothing)."""

    name: str
    cls: type[Optimizer]
    settings: dict[str, Any] = field(default_factory=dict)
    repeats: bool = True
    exact: int = 0

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return MATRICES if self.cls is torch.optim.Muon else SHAPES

    def make(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> Optimizer:
        torch.manual_seed(seed)
        weights = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in self.shapes]
        return self.cls(weights, **self.settings)  # type: ignore[call-arg]


optim = torch.optim
ANY = 6
CASES = [
    Case("sgd", optim.SGD, {"lr": 0.1}, exact=ANY),
    Case("sgd_maximize", optim.SGD, {"lr": 0.1, "maximize": True}, exact=ANY),
    Case("sgd_decay", optim.SGD, {"lr": 0.1, "weight_decay": 0.1}, repeats=False, exact=1),
    Case("sgd_momentum", optim.SGD, {"lr": 0.1, "momentum": 0.8}),
    Case("sgd_momentum_decay_dampening", optim.SGD, {"lr": 0.1, "momentum": 0.8, "dampening": 0.5, "weight_decay": 0.1}),
    Case("sgd_momentum_maximize", optim.SGD, {"lr": 0.1, "momentum": 0.8, "maximize": True}),
    Case("sgd_nesterov", optim.SGD, {"lr": 0.1, "momentum": 0.8, "nesterov": True}),
    Case("sgd_nesterov_maximize", optim.SGD, {"lr": 0.1, "momentum": 0.8, "nesterov": True, "maximize": True}),
    Case("sgd_nesterov_decay", optim.SGD, {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1}, repeats=False),
    Case("adam", optim.Adam, {"lr": 0.01, "eps": 1e-3}, exact=ANY),
    Case("adam_maximize", optim.Adam, {"lr": 0.01, "maximize": True}, exact=ANY),
    Case("adam_coupled_decay", optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
    Case("adam_amsgrad", optim.Adam, {"lr": 0.01, "betas": (0.8, 0.9), "amsgrad": True}, exact=ANY),
    Case(
        "adam_decoupled", optim.Adam, {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}, repeats=False, exact=1
    ),
    Case("adam_tensor_lr", optim.Adam, {"lr": torch.tensor(0.01, dtype=torch.float64), "foreach": False}, exact=ANY),
    Case("adam_fused", optim.Adam, {"lr": 0.01, "fused": True}, exact=ANY),
    Case("adamw", optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}, repeats=False, exact=1),
    Case("adamw_no_decay", optim.AdamW, {"lr": 0.01, "weight_decay": 0.0}, exact=ANY),
    Case("nadam", optim.NAdam, {"lr": 0.01}),
    Case("nadam_maximize", optim.NAdam, {"lr": 0.01, "maximize": True}),
    Case("nadam_decay", optim.NAdam, {"lr": 0.01, "weight_decay": 0.1}, repeats=False),
    Case("nadam_decoupled", optim.NAdam, {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}, repeats=False),
    Case("radam", optim.RAdam, {"lr": 0.01}),
    Case("radam_early", optim.RAdam, {"lr": 0.01, "betas": (0.9, 0.6)}, exact=ANY),  # rho_inf = 4: never rectified
    Case("radam_rectified", optim.RAdam, {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1}),
    Case(
        "radam_decoupled",
        optim.RAdam,
        {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True},
        repeats=False,
        exact=1,
    ),
    Case("adamax", optim.Adamax, {"lr": 0.01}, exact=ANY),
    Case("adamax_decay", optim.Adamax, {"lr": 0.01, "weight_decay": 0.1, "maximize": True}),
    Case("adagrad", optim.Adagrad, {"lr": 0.1}),
    Case("adagrad_maximize", optim.Adagrad, {"lr": 0.1, "maximize": True, "initial_accumulator_value": 0.5}),
    Case("adagrad_lr_decay", optim.Adagrad, {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1}, repeats=False),
    Case("adadelta", optim.Adadelta, {"lr": 1.0}),
    Case("adadelta_decay", optim.Adadelta, {"lr": 1.0, "weight_decay": 0.1, "maximize": True}, repeats=False),
    Case("adadelta_maximize", optim.Adadelta, {"lr": 1.0, "maximize": True}),
    Case("rmsprop", optim.RMSprop, {"lr": 0.01}),
    Case("rmsprop_maximize", optim.RMSprop, {"lr": 0.01, "maximize": True}),
    Case("rmsprop_momentum", optim.RMSprop, {"lr": 0.01, "momentum": 0.8, "weight_decay": 0.1}),
    Case("rmsprop_centered", optim.RMSprop, {"lr": 0.01, "centered": True}),
    Case("rprop", optim.Rprop, {"lr": 0.01}, repeats=False, exact=ANY),
    Case("rprop_maximize", optim.Rprop, {"lr": 0.01, "maximize": True, "step_sizes": (1e-6, 0.02)}, repeats=False, exact=ANY),
    Case("asgd", optim.ASGD, {"lr": 0.01, "lambd": 0.1, "weight_decay": 0.1}, repeats=False, exact=1),
    Case("asgd_maximize", optim.ASGD, {"lr": 0.01, "maximize": True}, repeats=False, exact=1),
    Case("adafactor", optim.Adafactor, {"lr": 0.01, "weight_decay": 0.0}, repeats=False, exact=1),
    Case("adafactor_maximize", optim.Adafactor, {"lr": 0.01, "weight_decay": 0.0, "maximize": True}, repeats=False, exact=1),
    Case("adafactor_relative", optim.Adafactor, {"lr": 1.0, "weight_decay": 0.0}, repeats=False, exact=1),
    Case("adafactor_decay", optim.Adafactor, {"lr": 0.01, "weight_decay": 0.1}, repeats=False),
    Case("rotated_adam", RotatedAdam, {"lr": 0.01, "weight_decay": 0.0, "eps": 1e-3, "refresh_every": 2}, exact=ANY),
    Case(
        "rotated_adam_unilateral", RotatedAdam, {"lr": 0.01, "weight_decay": 0.0, "eps": 1e-3, "sides": "unilateral"}, exact=ANY
    ),
    Case(
        "rotated_adam_decay",
        RotatedAdam,
        {"lr": 0.01, "weight_decay": 0.1, "max_dim": 3, "refresh_every": 100},
        repeats=False,
        exact=1,
    ),
    Case("muon", optim.Muon, {"lr": 0.01, "weight_decay": 0.0}),
    Case("muon_plain", optim.Muon, {"lr": 0.01, "weight_decay": 0.0, "nesterov": False, "adjust_lr_fn": "match_rms_adamw"}),
    Case(
        "adamw_options",
        optim.AdamW,
        {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-3, "amsgrad": True, "weight_decay": 0.0},
        exact=ANY,
    ),
    Case("nadam_eps", optim.NAdam, {"lr": 0.01, "eps": 1e-3}),
    Case("radam_maximize", optim.RAdam, {"lr": 0.01, "maximize": True}),
    Case("adamax_eps", optim.Adamax, {"lr": 0.01, "eps": 1e-3}, exact=ANY),
    Case("rmsprop_eps", optim.RMSprop, {"lr": 0.01, "eps": 1e-3, "alpha": 0.9}),
    Case("asgd_options", optim.ASGD, {"lr": 0.01, "alpha": 0.5, "t0": 2.0}, repeats=False, exact=1),
    Case(
        "adafactor_options",
        optim.Adafactor,
        {"lr": 0.01, "weight_decay": 0.0, "eps": (1e-10, 1e-2), "beta2_decay": -0.6, "d": 1.5},
        repeats=False,
        exact=1,
    ),
    Case("muon_momentum", optim.Muon, {"lr": 0.01, "weight_decay": 0.0, "momentum": 0.8}),
    Case("muon_decay", optim.Muon, {"lr": 0.01, "weight_decay": 0.1}, repeats=False),
]
BY_NAME = {case.name: case for case in CASES}


def weights_of(optimizer: Optimizer) -> list[Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def values_of(optimizer: Optimizer) -> list[Tensor]:
    return [weight.detach().clone() for weight in weights_of(optimizer)]


def set_random_grads(optimizer: Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in weights_of(optimizer):
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        weight.grad = torch.empty_like(weight).copy_(noise)


def train(optimizer: Optimizer, updates: int, *, constant: bool = False) -> list[Tensor]:
    """Step with random (or once drawn and constant) gradients, left in place; returns the weights before the last step."""
    before = values_of(optimizer)
    for update in range(updates):
        set_random_grads(optimizer, 100 if constant else 100 + update)
        before = values_of(optimizer)
        optimizer.step()
    return before


def really_stepped(
    optimizer: Optimizer,
    steps: int,
    *,
    grads: Sequence[Tensor | None] | None = None,
    before_each: Callable[..., None] | None = None,
) -> list[Tensor]:
    """The oracle: the weights after really stepping a copy with the gradients held constant."""
    twin = copy.deepcopy(optimizer)
    held = grads if grads is not None else [w.grad for w in weights_of(optimizer)]
    for step in range(steps):
        if before_each is not None:
            before_each(twin, step)
        for weight, grad in zip(weights_of(twin), held, strict=True):
            weight.grad = None if grad is None else grad.clone()
        twin.step()
    return values_of(twin)


def half_seen(optimizer: Optimizer, kind: str) -> dict[str, Any]:
    """What `predict_weights` is told for this kind: half of a mini-batch seen, with the present gradients."""
    if kind != "in_progress":
        return {}
    return {"in_progress": [PartialGradient(w.grad, 0.5) for w in weights_of(optimizer)]}


def largest_difference(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    pairs = list(zip(first, second, strict=True))
    return max(float((a.detach().double() - b.detach().double()).abs().max()) for a, b in pairs)


class Lion(Optimizer):
    """A third-party optimizer (Chen et al. 2023), with an attribute that torch's own copying would drop."""

    def __init__(self, params: Any, lr: float = 1e-2, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})
        self.calls = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.calls += 1
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.sub_(group["lr"] * (b1 * m + (1 - b1) * p.grad).sign())
                m.mul_(b2).add_(p.grad, alpha=1 - b2)
