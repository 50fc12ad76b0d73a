"""Cutting, optimizers by name, schedules by name."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import StepLR

import tiny
from pipeoptim.config import Component
from pipeoptim.errors import ConfigError
from pipeoptim.train import lr_schedules, optimizers
from pipeoptim.train.cut import balance, cut
from pipeoptim.train.parameter_groups import check_all_used


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(1, 5))
def test_balance_is_the_best_of_all_cuts(costs: list[int], parts: int) -> None:
    def value(ends: tuple[int, ...]) -> tuple[int, int] | None:
        edges = [0, *ends, len(costs)]
        sums = [sum(costs[a:b]) for a, b in pairwise(edges)]
        return (max(sums), sum(s * s for s in sums)) if min(sums) > 0 else None

    values = [v for ends in combinations(range(1, len(costs)), parts - 1) if (v := value(ends))]
    if not values:
        with pytest.raises(ConfigError, match="ha(s|ve) parameters"):
            balance(costs, parts)
        return
    lengths = balance(costs, parts)
    assert value(tuple(sum(lengths[: i + 1]) for i in range(parts - 1))) == min(values)


def test_pieces_are_the_model() -> None:
    model = tiny.model().eval()
    x = torch.randn(4, 6)
    for stages in (1, 2, 3, 4):
        value = x
        names: list[str] = []
        for piece in cut(model, stages):
            value = piece(value)
            names += piece.state_dict()
        assert value.equal(model(x))
        assert names == list(model.state_dict())


def test_models_that_cannot_be_cut() -> None:
    with pytest.raises(ConfigError, match="cannot be sliced"):
        cut(nn.Linear(2, 2), 1)


@pytest.mark.parametrize("name", [*optimizers.known(), *optimizers.ALIASES])
def test_every_optimizer_can_be_named(name: str) -> None:
    """In any case, with an lr, and after a switch from another one whose options it may not have."""
    recipe = Component("adamw", {"lr": 0.01, "weight_decay": 0.1, "betas": [0.9, 0.95]})
    make = optimizers.factory(optimizers.switch(recipe, name.upper()))
    optimizer = make([nn.Parameter(torch.ones(2, 2))])
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert type(optimizer).__name__.lower() == optimizers.ALIASES.get(name, (name, {}))[0].lower()


def test_optimizer_options_are_not_guessed() -> None:
    with pytest.raises(ConfigError, match=r"optimizer adam\(.*momentum=0.9.*cannot be made"):
        optimizers.factory(Component("adam", {"momentum": 0.9}))([nn.Parameter(torch.ones(2))])
    momentum = optimizers.factory(Component("Momentum", {"lr": 0.1}))([nn.Parameter(torch.ones(2))])
    assert momentum.param_groups[0]["momentum"] == 0.9
    own = optimizers.factory(Component("torch.optim:Adam", {"lr": 0.1}))([nn.Parameter(torch.ones(2))])
    assert isinstance(own, torch.optim.Adam)


def test_layers_choose_the_weights_of_a_group() -> None:
    """An embedding, its tied head and a linear layer; of bare parameters no layer is known."""
    embedding, head = nn.Embedding(5, 3), nn.Linear(3, 5)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, nn.Linear(3, 3), head)
    groups = [{"layer": "Embedding", "rotate": False}, {"layer": "Linear", "ndim": 2, "sides": "unilateral"}]
    make = optimizers.factory(Component("Rotated_Adam", {"lr": 0.1, "groups": groups}))
    found = [([tuple(p.shape) for p in g["params"]], g["rotate"], g["sides"]) for g in make(model).param_groups]
    assert found == [([(5, 3)], False, "bilateral"), ([(3, 3)], True, "unilateral"), ([(3,), (5,)], True, "bilateral")]
    assert len(make(model.parameters()).param_groups) == 1
    with pytest.raises(ConfigError, match="layer of a parameter group is 3, must be a class of modules"):
        optimizers.factory(Component("adamw", {"groups": [{"layer": 3}]}))
    with pytest.raises(ConfigError, match="takes no weights: the model has none of that kind"):
        check_all_used([model], [{"layer": "Conv2d"}])


def rates(component: Component, updates: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.5)
    scheduler = lr_schedules.factory(component, updates)(optimizer)
    found = []
    for _ in range(updates):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return found


def test_schedules() -> None:
    assert rates(Component("constant"), 3) == [0.5] * 3
    cosine = rates(Component("cosine", {"warmup": 4, "final": 0.1}), 40)
    assert cosine[:4] == [0.125, 0.25, 0.375, 0.5]
    assert cosine[3:] == sorted(cosine[3:], reverse=True)
    assert cosine[-1] == pytest.approx(0.05, abs=0.001)
    reference = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.5)
    expected = StepLR(reference, step_size=3, gamma=0.5)
    for rate in rates(Component("step", {"every": 3, "gamma": 0.5}), 10):
        assert rate == pytest.approx(reference.param_groups[0]["lr"])
        reference.step()
        expected.step()


@pytest.mark.parametrize(
    ("component", "message"),
    [
        (Component("cosin"), "did you mean 'cosine'"),
        (Component("cosine", {"warmup": -1}), "warmup is -1"),
        (Component("cosine", {"warmup": 11}), "warmup is 11 .* at most 10, .* set steps to 11 or more"),
        (Component("cosine", {"final": 2}), "final is 2"),
        (Component("step", {"every": 0}), "every is 0"),
        (Component("step"), "cannot be made"),
        (Component("step", {"every": 3, "gama": 1}), "gama"),
    ],
)
def test_schedules_that_cannot_be(component: Component, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lr_schedules.factory(component, 10)


def test_schedule_of_ones_own() -> None:
    component = Component("torch.optim.lr_scheduler:StepLR", {"step_size": 1, "gamma": 0.1})
    assert rates(component, 3) == pytest.approx([0.5, 0.05, 0.005])
