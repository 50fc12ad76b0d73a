"""Refusals, optimizers from elsewhere, and tracking."""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest
import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from pipeoptim.errors import ConfigError
from pipeoptim.rules import RULES, Move, Predictor, Rule, Term, predict_weights, register_rule, track
from pipeoptim.rules.tracking import _TRACKERS
from rules_cases import BY_NAME, Lion, largest_difference, really_stepped, set_random_grads, values_of, weights_of


def lion(**settings: Any) -> Lion:
    torch.manual_seed(0)
    return Lion([torch.nn.Parameter(torch.randn(4, 3, dtype=torch.float64)) for _ in range(2)], **settings)


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [-1, 1.0, "2", None, True])
def test_steps_that_are_no_count_are_refused(steps: Any) -> None:
    with pytest.raises(ConfigError, match="steps="):
        predict_weights(BY_NAME["adam"].make(), steps)


def test_unknown_and_unoffered_kinds_are_refused_and_the_offer_is_named() -> None:
    with pytest.raises(ConfigError, match="refined, paper, decayed, in_progress, displacement"):
        predict_weights(BY_NAME["adam"].make(), 1, kind="best")
    with pytest.raises(
        ConfigError, match="no momentum that could decay; choose one of refined, paper, in_progress, displacement"
    ):
        Predictor(BY_NAME["adagrad"].make(), kind="decayed")
    with pytest.raises(ConfigError, match="Lion has none"):
        predict_weights(lion(), 1, kind="decayed")


def test_lbfgs_and_sparse_adam_are_refused_with_their_reason() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ConfigError, match="closure"):
        predict_weights(torch.optim.LBFGS([weight]), 1)
    with pytest.raises(ConfigError, match="sparse"):
        Predictor(torch.optim.SparseAdam([weight]))


def test_sparse_gradients_and_weights_and_differentiable_are_refused() -> None:
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = torch.optim.SGD(embedding.parameters(), lr=0.1)
    embedding(torch.tensor([1])).sum().backward()
    optimizer.step()
    with pytest.raises(ConfigError, match="sparse=False"):
        predict_weights(optimizer, 1)
    with pytest.raises(ConfigError, match="only dense parameters"):
        predict_weights(torch.optim.SGD([torch.eye(2).to_sparse().requires_grad_()], lr=0.1), 1)
    weight = torch.nn.Parameter(torch.zeros(2))
    for use in (Predictor, lambda o: predict_weights(o, 1)):
        with pytest.raises(ConfigError, match="differentiable=True"):
            use(torch.optim.Adam([weight], differentiable=True))


def test_something_else_is_refused() -> None:
    with pytest.raises(ConfigError, match="not an optimizer"):
        predict_weights(torch.nn.Linear(1, 1), 1)  # type: ignore[arg-type]


# ---- optimizers without a rule -------------------------------------------------------------------


def test_third_party_steps_a_copy_and_changes_nothing() -> None:
    optimizer = lion()
    for seed in range(3):
        set_random_grads(optimizer, seed)
        optimizer.step()
    before = values_of(optimizer)
    moments = [optimizer.state[w]["m"].clone() for w in weights_of(optimizer)]
    hooked: list[int] = []
    real = really_stepped_lion(optimizer)
    optimizer.register_step_pre_hook(lambda *_: hooked.append(1))
    everywhere = register_optimizer_step_pre_hook(lambda *_: hooked.append(2))
    assert largest_difference(predict_weights(optimizer, 1), real) == 0
    everywhere.remove()
    for got, now, after in zip(predict_weights(optimizer, 3), before, real, strict=True):
        torch.testing.assert_close(got, now + 3 * (after - now), rtol=0, atol=1e-14)
    assert optimizer.calls == 3
    assert hooked == []
    assert largest_difference(values_of(optimizer), before) == 0
    assert all(torch.equal(optimizer.state[w]["m"], m) for w, m in zip(weights_of(optimizer), moments, strict=True))


def really_stepped_lion(optimizer: Lion) -> list[torch.Tensor]:
    twin = Lion([torch.nn.Parameter(w) for w in values_of(optimizer)])
    for a, b in zip(weights_of(twin), weights_of(optimizer), strict=True):
        twin.state[a]["m"] = optimizer.state[b]["m"].clone()
        a.grad = b.grad.clone()
    twin.step()
    return values_of(twin)


def test_third_party_under_a_scheduler_does_not_step_the_original() -> None:
    """A scheduler binds `step` to the original optimizer: a careless copy would step that one."""
    optimizer = lion()
    torch.optim.lr_scheduler.StepLR(optimizer, 5)
    set_random_grads(optimizer, 0)
    optimizer.step()
    before = values_of(optimizer)
    assert largest_difference(predict_weights(optimizer, 2), before) > 1e-3
    assert largest_difference(values_of(optimizer), before) == 0


def test_random_numbers_of_a_noisy_optimizer_are_put_back() -> None:
    class Langevin(Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for weight in weights_of(self):
                weight.add_(torch.randn_like(weight))

    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.ones(2)
    state = torch.get_rng_state()
    predict_weights(Langevin([weight]), 1)
    assert torch.equal(torch.get_rng_state(), state)


def test_optimizer_whose_copy_cannot_step_gives_the_weights_and_says_so() -> None:
    class NeedsClosure(Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

        def step(self, closure: Any = None) -> None:
            closure()

    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    with pytest.warns(UserWarning, match="track"):
        assert torch.equal(predict_weights(NeedsClosure([weight]), 1)[0], weight)


def test_third_party_without_gradients_gives_the_weights_and_says_so_once_it_has_stepped() -> None:
    optimizer = lion()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert largest_difference(predict_weights(optimizer, 2), values_of(optimizer)) == 0
    set_random_grads(optimizer, 0)
    optimizer.step()
    optimizer.zero_grad()
    with pytest.warns(UserWarning, match=r"track\(optimizer\)"):
        assert largest_difference(predict_weights(optimizer, 2), values_of(optimizer)) == 0


# ---- tracking ------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lion, BY_NAME["adamw"].make])
def test_tracking_gives_the_last_displacement(make: Any) -> None:
    optimizer = make()
    rng = random.getstate()
    with track(optimizer) as handle:
        assert track(optimizer) is handle
        for seed in range(3):
            set_random_grads(optimizer, seed)
            before = values_of(optimizer)
            optimizer.step()
            optimizer.zero_grad()
        expected = [w + 4 * (w - old) for w, old in zip(values_of(optimizer), before, strict=True)]
        assert largest_difference(predict_weights(optimizer, 4, kind="displacement"), expected) < 1e-13
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2, dtype=torch.float64))]})
        assert torch.equal(predict_weights(optimizer, 4, kind="displacement")[-1], torch.ones(2, dtype=torch.float64))
    assert random.getstate() == rng
    assert optimizer not in _TRACKERS
    assert not optimizer._optimizer_step_pre_hooks
    with pytest.warns(UserWarning, match="unknown"):
        predict_weights(optimizer, 4, kind="displacement")


def test_trackers_do_not_keep_optimizers_alive() -> None:
    import gc
    import weakref

    optimizer = lion()
    track(optimizer)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None


# ---- registering a rule of one's own -------------------------------------------------------------


def test_registered_rule_is_used_and_must_state_its_case() -> None:
    class SignLion(Rule):
        exact = "a constant gradient from the first update on"
        source = "Chen et al. 2023"

        def move(self, weight: Any, state: Any, grad: Any, group: Any, ahead: Any) -> Move | None:
            return Move((Term(ahead.lr_sum, state["m"].sign()),)) if "m" in state else None

    register_rule(Lion)(SignLion)
    try:
        optimizer = lion()
        for _ in range(3):
            set_random_grads(optimizer, 7)
            optimizer.step()
        twin = really_stepped_lion(optimizer)
        assert largest_difference(predict_weights(optimizer, 1), twin) < 1e-14
        assert isinstance(RULES[Lion], SignLion)
    finally:
        del RULES[Lion]

    class Silent(SignLion):
        exact = ""

    with pytest.raises(ConfigError, match="Silent does not say"):
        register_rule(Lion)(Silent)


def test_really_stepped_is_an_oracle_of_its_own() -> None:
    """The oracle of these tests must move weights without the code under test."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    weight.grad = torch.ones(1)
    assert really_stepped(optimizer, 3)[0].item() == -1.5
