"""Several optimizers in one, and a kind of prediction for each param group."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor

import pipeoptim as po
from pipeoptim.errors import ConfigError
from pipeoptim.rules import KINDS, CombinedOptimizer, Predictor, find_rule, muon_adamw, predict_weights, track
from rules_cases import Lion, largest_difference, set_random_grads, values_of, weights_of


def params() -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    torch.manual_seed(0)
    return (
        torch.nn.Parameter(torch.randn(4, 6, dtype=torch.float64)),
        torch.nn.Parameter(torch.randn(5, dtype=torch.float64)),
    )


def muon_and_adamw() -> CombinedOptimizer:
    w, b = params()
    return CombinedOptimizer(torch.optim.Muon([w], lr=0.1), torch.optim.AdamW([b], lr=0.01))


def run(optimizer: torch.optim.Optimizer, updates: int, first: int = 0) -> None:
    for update in range(first, first + updates):
        set_random_grads(optimizer, update)
        optimizer.step()


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---- kinds per group ----------------------------------------------------------------------------------------------------


def grouped(*kinds: str | None) -> torch.optim.Optimizer:
    torch.manual_seed(0)
    groups = []
    for kind in kinds:
        group: dict[str, Any] = {"params": [torch.nn.Parameter(torch.randn(3, dtype=torch.float64))]}
        groups.append(group | ({} if kind is None else {"prediction": kind}))
    return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)


def test_each_group_is_predicted_by_its_own_kind() -> None:
    kinds = ["refined", "paper", "decayed", "displacement", "none", None]
    optimizer = grouped(*kinds)
    with track(optimizer):
        run(optimizer, 4)
        got = predict_weights(optimizer, 3, kind="paper")
        for kind, tensor, n in zip(kinds, got, range(len(kinds)), strict=True):
            for group in optimizer.param_groups:
                group["prediction"] = kind or "paper"
            assert torch.equal(tensor, predict_weights(optimizer, 3)[n]), kind
        assert torch.equal(got[4], weights_of(optimizer)[4])


@pytest.mark.parametrize("steps", [1, 3])
def test_predictor_does_as_predict_weights_does_with_kinds_per_group(steps: int) -> None:
    kinds = ["refined", "paper", "decayed", "displacement", "none", None]
    optimizer, twin = grouped(*kinds), grouped(*kinds)
    track(twin)
    predictor = Predictor(optimizer, kind="displacement")
    spare = [torch.full_like(w, float("nan")) for w in values_of(optimizer)]
    assert predictor.needs_previous
    for seed in range(3):
        for each in (optimizer, twin):
            set_random_grads(each, seed)
        predictor.before_step(spare)
        optimizer.step()
        predictor.after_step()
        twin.step()
        predictor.predict_into(spare, steps)
        assert same(spare, predict_weights(twin, steps, kind="displacement"))
    predictor.predict_into(spare, steps + 2)
    assert largest_difference(spare, predict_weights(twin, steps + 2, kind="displacement")) < 1e-14


def test_resume_with_kinds_per_group() -> None:
    kinds = ["refined", "displacement", "none"]
    optimizer = grouped(*kinds)
    predictor = Predictor(optimizer)
    spare = [torch.empty_like(w) for w in values_of(optimizer)]
    set_random_grads(optimizer, 0)
    predictor.before_step(spare)
    optimizer.step()
    predictor.after_step()
    predictor.predict_into(spare, 2)
    file = io.BytesIO()
    torch.save(predictor.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert [tensor is not None for tensor in state["known"]] == [False, True, False]  # no more than what is needed
    resumed = Predictor(optimizer)
    resumed.load_state_dict(state)
    other = [torch.empty_like(w) for w in spare]
    for p, out in ((predictor, spare), (resumed, other)):
        p.predict_into(out, 4)
    assert same(spare, other)
    with pytest.raises(ConfigError, match="kinds"):
        Predictor(grouped("paper", "displacement", "none")).load_state_dict(state)


def test_unknown_kind_of_a_group_is_refused_and_a_group_may_need_what_the_rest_cannot() -> None:
    with pytest.raises(ConfigError, match="'papper' is unknown"):
        Predictor(grouped("papper"))
    weight = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ConfigError, match="Adagrad"):
        Predictor(torch.optim.Adagrad([{"params": [weight], "prediction": "decayed"}]))
    Predictor(torch.optim.Adagrad([{"params": [weight], "prediction": "none"}]), kind="decayed")


def test_the_kind_of_a_group_survives_the_optimizers_state() -> None:
    optimizer = grouped("none", "paper")
    run(optimizer, 1)
    other = grouped(None, None)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [group["prediction"] for group in other.param_groups] == ["none", "paper"]


@pytest.mark.parametrize("kind", KINDS)
def test_engines_take_every_kind_for_a_group(kind: str) -> None:
    def make(parameters: Any) -> torch.optim.Optimizer:
        weights = list(parameters)
        return torch.optim.SGD([{"params": weights[:1], "prediction": kind}, {"params": weights[1:]}], lr=0.03, momentum=0.5)

    torch.manual_seed(0)
    stages = [torch.nn.Linear(3, 3) for _ in range(3)]
    # Copies of the weights are counted from the kind of the pipeline, so a group in progress needs a pipeline that is.
    whole = kind if KINDS[kind].in_progress else "refined"
    pipe = po.Emulator(stages, make, torch.nn.functional.mse_loss, prediction=whole)
    losses = [float(pipe.step(torch.ones(2, 3), target=torch.zeros(2, 3))) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]
    assert pipe.weight_bytes(0) <= 2 * sum(p.numel() * 4 for p in stages[0].parameters())


# ---- several optimizers as one ---------------------------------------------------------------------------------------------


def test_a_combination_steps_and_predicts_as_its_members_do_alone() -> None:
    both = muon_and_adamw()
    w, b = params()
    alone = torch.optim.Muon([w], lr=0.1), torch.optim.AdamW([b], lr=0.01)
    for seed in range(4):
        set_random_grads(both, seed)
        w.grad, b.grad = (p.grad.clone() for p in weights_of(both))
        both.step()
        for optimizer in alone:
            optimizer.step()
    assert same(values_of(both), [w.detach(), b.detach()])
    for kind in ("refined", "paper", "decayed"):
        expected = [p for optimizer in alone for p in predict_weights(optimizer, 3, kind=kind)]
        assert same(predict_weights(both, 3, kind=kind), expected)
        out = [torch.empty_like(p) for p in expected]
        predictor = Predictor(both, kind=kind)
        predictor.after_step()
        predictor.predict_into(out, 3)
        assert same(out, expected)


def test_state_of_a_combination_round_trips() -> None:
    both, other = muon_and_adamw(), muon_and_adamw()
    run(both, 3)
    file = io.BytesIO()
    torch.save(both.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for theirs, own in zip(weights_of(other), weights_of(both), strict=True):
        theirs.data.copy_(own)
    run(both, 2, first=3)
    run(other, 2, first=3)
    assert same(values_of(both), values_of(other))
    assert len(both.state) == 2
    with pytest.raises(ConfigError, match="same combination"):
        both.load_state_dict({"state": {}, "param_groups": []})


def test_schedulers_reach_the_members_and_are_rolled_forward() -> None:
    both = muon_and_adamw()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(both, 0.5)
    run(both, 1)
    scheduler.step()
    assert [group["lr"] for member in both.optimizers for group in member.param_groups] == [0.05, 0.005]
    halved = predict_weights(both, 2, scheduler=scheduler)
    full = predict_weights(both, 2)
    w, b = values_of(both)
    torch.testing.assert_close(halved[1] - b, 0.75 * (full[1] - b), rtol=1e-12, atol=0)
    assert largest_difference([halved[0]], [w]) < largest_difference([full[0]], [w])


def test_a_member_without_a_rule_is_predicted_by_its_last_displacement() -> None:
    w, b = params()
    both = CombinedOptimizer(Lion([w]), torch.optim.SGD([b], lr=0.1, momentum=0.9))
    predictor = Predictor(both)
    spare = [torch.empty_like(p) for p in values_of(both)]
    for seed in range(3):
        set_random_grads(both, seed)
        old = values_of(both)
        predictor.before_step(spare)
        both.step()
        predictor.after_step()
        predictor.predict_into(spare, 2)
    now = values_of(both)
    torch.testing.assert_close(spare[0], now[0] + 2 * (now[0] - old[0]), rtol=0, atol=1e-13)
    torch.testing.assert_close(spare[1], predict_weights(both.optimizers[1], 2)[0], rtol=0, atol=0)


def test_copies_zeroing_and_refusals() -> None:
    both = muon_and_adamw()
    run(both, 2)
    twin = copy.deepcopy(both)
    run(both, 1, first=2)
    run(twin, 1, first=2)
    assert same(values_of(both), values_of(twin))
    both.zero_grad()
    assert all(p.grad is None for p in weights_of(both))
    assert both.step(lambda: 7) == 7
    assert "Muon" in repr(both) and "AdamW" in repr(both)
    w, b = params()
    sgd = torch.optim.SGD([w, b], lr=0.1)
    with pytest.raises(ConfigError, match="at least one"):
        CombinedOptimizer()
    with pytest.raises(ConfigError, match="two of the combined"):
        CombinedOptimizer(sgd, torch.optim.SGD([b], lr=0.1))
    with pytest.raises(ConfigError, match="add it to the member"):
        both.add_param_group({"params": [w]})
    with pytest.raises(ConfigError, match="LBFGS"):
        CombinedOptimizer(torch.optim.LBFGS([w]))
    assert CombinedOptimizer(both, torch.optim.SGD([w], lr=0.1)).optimizers[:2] == both.optimizers  # flattened
    with pytest.raises(ConfigError, match="several optimizers"):
        find_rule(both)


def test_muon_for_matrices_and_adamw_for_the_rest_train_a_pipeline() -> None:
    torch.manual_seed(0)
    stages = [torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.Tanh()) for _ in range(3)]
    pipe = po.Emulator(
        stages,
        lambda p: muon_adamw(p, lr=0.02),
        torch.nn.functional.mse_loss,
        schedulers=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 60),
    )
    x, y = torch.randn(16, 8), torch.randn(16, 8).tanh()
    losses = [float(pipe.step(x, target=y)) for _ in range(60)]
    pipe.drain()
    assert losses[-1] < 0.5 * losses[0]
    state = pipe.stage_state_dict(1)
    assert len(state["optimizer"]["optimizers"]) == 2
    pipe.load_stage_state_dict(1, state)


def test_muon_adamw_gives_each_weight_to_one_of_them() -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Linear(4, 4))
    both = muon_adamw(module.parameters(), lr=0.1, muon_lr=0.2)
    assert [(group["lr"], len(group["params"])) for group in both.param_groups] == [(0.2, 1), (0.1, 3)]
    assert both.param_groups[0]["prediction"] == "cheapest"
    assert Predictor(both)._table.current().kinds == ["displacement", "refined"]
    assert Predictor(both, kind="in_progress")._table.current().kinds == ["in_progress", "in_progress"]
    assert "prediction" not in muon_adamw(module.parameters(), prediction=None).param_groups[0]
    assert len(muon_adamw([torch.nn.Parameter(torch.ones(3))]).param_groups) == 1
