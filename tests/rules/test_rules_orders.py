"""The error of each kind of prediction grows with lr and s as its entry in KINDS says: measured by regression of logarithms.

The gradient is smooth, g = A W + b, so it changes only because the weights do. Moments are given time to settle before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from pipeoptim.rules import KINDS, RULES, predict_weights
from rules_cases import largest_difference, values_of, weights_of

optim = torch.optim
SETTLED = {  # momentum that settles fast; nothing that keeps changing under a constant gradient; eps as large as gradients
    "sgd": (optim.SGD, {}),
    "momentum": (optim.SGD, {"momentum": 0.5}),
    "nesterov": (optim.SGD, {"momentum": 0.5, "nesterov": True}),
    "adam": (optim.Adam, {"betas": (0.5, 0.6), "eps": 10.0}),
    "amsgrad": (optim.Adam, {"betas": (0.5, 0.6), "amsgrad": True, "eps": 10.0}),
    "adamw": (optim.AdamW, {"betas": (0.5, 0.6), "weight_decay": 0.0, "eps": 10.0}),
    "nadam": (optim.NAdam, {"betas": (0.5, 0.6), "momentum_decay": 10.0, "eps": 10.0}),
    "rmsprop": (optim.RMSprop, {"alpha": 0.5, "eps": 10.0}),
    "rmsprop_momentum": (optim.RMSprop, {"alpha": 0.5, "momentum": 0.5, "eps": 10.0}),
    "asgd": (optim.ASGD, {"lambd": 0.0}),
}
SCALE_FREE = {  # the size of a gradient divides out, and with it what is of second order
    "adam": (optim.Adam, {"betas": (0.5, 0.6)}),
    "adamax": (optim.Adamax, {"betas": (0.5, 0.6)}),
    "rmsprop": (optim.RMSprop, {"alpha": 0.5}),
}
RATES = [2.0**-k for k in range(11, 18)]
STEPS = [8, 16, 32, 64]


class Smooth:
    """W in R^4 with the gradient of a quadratic form, stepped by an optimizer."""

    def __init__(self, cls: type[Optimizer], settings: dict[str, Any], lr: float, updates: int = 45) -> None:
        generator = torch.Generator().manual_seed(4)
        start = torch.randn(4, generator=generator, dtype=torch.float64) + 3.0
        root = torch.randn(4, 4, generator=generator, dtype=torch.float64)
        self.a = root @ root.T / 4 + torch.eye(4, dtype=torch.float64)
        self.weight = torch.nn.Parameter(start)
        self.optimizer = cls([self.weight], lr=lr, **settings)  # type: ignore[call-arg]
        self.noise: torch.Generator | None = None
        self.settle(updates)

    def settle(self, updates: int) -> None:
        for _ in range(updates):
            self.step()

    def step(self) -> None:
        self.weight.grad = self.a @ self.weight.detach()
        if self.noise is not None:
            self.weight.grad += torch.randn(4, generator=self.noise, dtype=torch.float64)
        self.optimizer.step()

    def error(self, steps: int, predicted: list[Tensor], each: Callable[[], None] = lambda: None) -> float:
        for _ in range(steps):
            self.step()
            each()
        return largest_difference(predicted, values_of(self.optimizer))


def slope(xs: Iterable[float], ys: Iterable[float]) -> float:
    """Of the line through (log x, log y), by least squares."""
    points = [(math.log(x), math.log(y)) for x, y in zip(xs, ys, strict=True)]
    mean_x, mean_y = (sum(column) / len(points) for column in zip(*points, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def measured(setting: tuple[type[Optimizer], dict[str, Any]], kind: str, lr: float, steps: int) -> float:
    cls, settings = setting
    run = Smooth(cls, settings, lr)
    old = run.weight.detach().clone()
    if kind == "displacement":
        run.step()
        now = run.weight.detach()
        predicted = [now + steps * (now - old)]
    else:
        predicted = predict_weights(run.optimizer, steps, kind=kind)
    return run.error(steps, predicted)


def claims() -> list[Any]:
    pairs = [(name, kind) for name in SETTLED for kind in KINDS if (name, kind) != ("amsgrad", "paper")]  # knows no amsgrad
    offered = [p for p in pairs if p[1] in RULES[SETTLED[p[0]][0]].kinds]
    return [
        (name, kind) for name, kind in offered if kind != "in_progress" or keeps_momentum(SETTLED[name])
    ]  # nothing else is known


def keeps_momentum(setting: tuple[type[Optimizer], dict[str, Any]]) -> bool:
    run = Smooth(*setting, lr=RATES[0], updates=1)
    return (
        RULES[setting[0]].momentum(run.weight.detach(), run.optimizer.state[run.weight], run.optimizer.param_groups[0])
        is not None
    )


@pytest.mark.parametrize(("name", "kind"), claims())
def test_order_in_the_learning_rate(name: str, kind: str) -> None:
    errors = [measured(SETTLED[name], kind, lr, 4) for lr in RATES]
    assert slope(RATES, errors) == pytest.approx(KINDS[kind].lr_order, abs=0.1)


@pytest.mark.parametrize("name", SCALE_FREE)
@pytest.mark.parametrize("kind", ["refined", "paper", "displacement"])
def test_optimizers_that_normalize_are_an_order_better(name: str, kind: str) -> None:
    rates = [2.0**-k for k in range(10, 15)]
    assert slope(rates, [measured(SCALE_FREE[name], kind, lr, 4) for lr in rates]) == pytest.approx(3, abs=0.15)


@pytest.mark.parametrize(("name", "kind"), claims())
def test_order_in_the_steps(name: str, kind: str) -> None:
    lr = 2.0**-18  # s * lr stays small
    errors = [measured(SETTLED[name], kind, lr, steps) for steps in STEPS]
    assert slope(STEPS, errors) == pytest.approx(KINDS[kind].steps_order, abs=0.15)


@pytest.mark.parametrize(("kind", "order"), [("refined", 2), ("paper", 1), ("displacement", 2)])
def test_decoupled_decay_costs_the_paper_an_order(kind: str, order: int) -> None:
    settings = {"betas": (0.5, 0.6), "weight_decay": 0.3}
    errors = []
    for lr in RATES:
        run = Smooth(optim.AdamW, settings, lr)
        old = run.weight.detach().clone()
        if kind == "displacement":
            run.step()
            now = run.weight.detach()
            predicted = [now + 4 * (now - old)]
        else:
            predicted = predict_weights(run.optimizer, 4, kind=kind)
        errors.append(run.error(4, predicted))
    assert slope(RATES, errors) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize(("scheduled", "kind", "order"), [(True, "refined", 2), (False, "refined", 1), (True, "paper", 1)])
def test_rolling_the_schedule_gains_an_order(scheduled: bool, kind: str, order: int) -> None:
    """The scheduled prediction is kind="refined" with the scheduler given: the rate halves with every update here."""
    errors = []
    for lr in RATES:
        run = Smooth(optim.Adam, {"betas": (0.5, 0.6)}, lr)
        scheduler = optim.lr_scheduler.ExponentialLR(run.optimizer, 0.5)
        predicted = predict_weights(run.optimizer, 4, kind=kind, scheduler=scheduler if scheduled else None)
        errors.append(run.error(4, predicted, scheduler.step))
    assert slope(RATES, errors) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("kind", ["refined", "paper", "displacement"])
def test_noise_makes_every_kind_of_order_one(kind: str) -> None:
    errors = []
    for lr in RATES:
        run = Smooth(optim.SGD, {"momentum": 0.5}, lr)
        run.noise = torch.Generator().manual_seed(1)
        run.step()
        old = run.weight.detach().clone()
        run.step()
        now = run.weight.detach()
        displaced = [now + 4 * (now - old)]
        predicted = displaced if kind == "displacement" else predict_weights(run.optimizer, 4, kind=kind)
        errors.append(run.error(4, predicted))
    assert slope(RATES, errors) == pytest.approx(1, abs=0.1)


def test_every_kind_states_what_it_is() -> None:
    for name, kind in KINDS.items():
        assert kind.formula and kind.exact, name
        assert (kind.lr_order, kind.steps_order) in ((1, 1), (2, 2))


def test_the_setting_moves() -> None:
    run = Smooth(*SETTLED["momentum"], lr=RATES[0])
    assert (
        largest_difference(weights_of(run.optimizer), values_of(Smooth(*SETTLED["momentum"], lr=RATES[0], updates=0).optimizer))
        > 0.1
    )
