"""What a prediction is made from besides the optimizer's state: its scale, and the gradient of the mini-batch in progress."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.optim import Optimizer

from pipeoptim.checkpoint.carried_predictor import joined_predictor, split_predictor
from pipeoptim.checkpoint.plain_data import flatten, rebuild
from pipeoptim.kernels import available
from pipeoptim.rules import KINDS, RULES, Horizon, Move, PartialGradient, Predictor, Rule, Term, register_rule
from pipeoptim.rules.entries import parameter_entries
from pipeoptim.rules.lr import next_rates
from pipeoptim.rules.registry import RULE_KINDS
from pipeoptim.rules.rule_moves import predict_by_rule
from rules_cases import CASES, Case, Lion, set_random_grads, train, values_of, weights_of

STEPS = 3


def buffers(optimizer: Optimizer) -> list[Tensor]:
    return [torch.full_like(w, float("nan")) for w in values_of(optimizer)]


def scaled_by_formula(optimizer: Optimizer, predicted: list[Tensor], scale: float) -> list[Tensor]:
    return [w + scale * (w_hat - w) for w, w_hat in zip(values_of(optimizer), predicted, strict=True)]


def by_rule(optimizer: Optimizer, kind: str, scale: float = 1.0) -> list[Tensor]:
    out = buffers(optimizer)
    scales = [scale] * len(optimizer.param_groups)
    horizon = Horizon(STEPS, next_rates(optimizer, None, STEPS), scales)
    predict_by_rule(parameter_entries(optimizer, kind), [w.grad for w in weights_of(optimizer)], horizon, out)
    return out


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(CASES), st.floats(-1.0, 2.0), st.data())
def test_every_rule_is_scaled(case: Case, scale: float, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from([k for k in RULES[case.cls].kinds if k in RULE_KINDS]))
    optimizer = case.make()
    train(optimizer, 3)
    expected = scaled_by_formula(optimizer, by_rule(optimizer, kind), scale)
    for found, value in zip(by_rule(optimizer, kind, scale), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", RULE_KINDS)
def test_a_scale_of_one_changes_no_bit(kind: str) -> None:
    for case in CASES:
        if kind in RULES[case.cls].kinds:
            optimizer = case.make()
            train(optimizer, 2)
            entry = parameter_entries(optimizer, kind)[0]
            ahead = Horizon(STEPS, next_rates(optimizer, None, STEPS)).ahead(entry)
            move = RULES[case.cls].move(entry.weight.detach(), entry.state, entry.weight.grad, entry.group, ahead)
            assert move is None or move.scaled(ahead.scale) is move


@pytest.mark.parametrize("scale", [0.0, 0.25, 1.5])
def test_displacements_are_scaled_in_every_order_of_calls(scale: float) -> None:
    torch.manual_seed(0)
    optimizer = Lion([torch.nn.Parameter(torch.randn(5, dtype=torch.float64))])
    predictor, spare = Predictor(optimizer), buffers(optimizer)
    for seed in range(2):
        set_random_grads(optimizer, seed)
        before = values_of(optimizer)
        predictor.before_step(spare)
        optimizer.step()
        predictor.after_step()
    moved = [now - then for now, then in zip(values_of(optimizer), before, strict=True)]
    predictor.scales = (scale,)
    for steps, out in ((2, buffers(optimizer)), (2, spare), (4, spare), (1, buffers(optimizer))):
        predictor.predict_into(out, steps)
        for found, w, d in zip(out, values_of(optimizer), moved, strict=True):
            torch.testing.assert_close(found, w + scale * steps * d, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not available(), reason="no C compiler")
@pytest.mark.parametrize("over_gradients", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "in_progress"])  # which a fused step does not predict
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
        (torch.optim.RAdam, {"lr": 0.01}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        (torch.optim.RMSprop, {"lr": 0.01}),
        (torch.optim.Adagrad, {"lr": 0.01}),
    ],
)
def test_the_fused_step_scales_like_the_plain_path(
    cls: type[Optimizer], options: dict[str, object], kind: str, over_gradients: bool
) -> None:
    if kind not in RULES[cls].kinds:
        pytest.skip("not offered")
    torch.manual_seed(0)
    optimizer = cls([{"params": [torch.nn.Parameter(torch.randn(s))]} for s in ((40, 3), (7,))], **options)  # type: ignore[call-arg]
    predictor, out = Predictor(optimizer, kind=kind), buffers(optimizer)
    for seed in range(7):  # RAdam is rectified after five
        set_random_grads(optimizer, seed)
        optimizer.step()
        predictor.after_step()
    predictor.scales = scales = (0.6, 1.5)
    set_random_grads(optimizer, 9)
    before = values_of(optimizer)
    grads = [w.grad for w in weights_of(optimizer)]
    kept = [g.clone() for g in grads if g is not None]
    if over_gradients:
        del grads
        found = predictor.fused_step_over_gradients(STEPS)
        if found is None:
            assert predictor.needs_grad  # then nothing may be written over the gradients
            return
        out = found
    else:
        assert predictor.fused_step(out, STEPS)
    assert predictor.still_holds(STEPS)
    if kind == "displacement":
        expected = [w + x * STEPS * (w - b) for w, b, x in zip(values_of(optimizer), before, scales, strict=True)]
    else:
        for w, g in zip(weights_of(optimizer), kept, strict=True):
            w.grad = g
        whole = by_rule(optimizer, kind)
        expected = [w + x * (w_hat - w) for w, w_hat, x in zip(values_of(optimizer), whole, scales, strict=True)]
    for a, b in zip(out, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
    predictor.scales = (0.6, 1.0)
    assert not predictor.still_holds(STEPS)


def test_a_rule_may_read_the_gradient_of_the_mini_batch_in_progress() -> None:
    class Follower(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    @register_rule(Follower)
    class FollowerRule(Rule):
        exact, source, no_decayed = "never", "this test", "it keeps no momentum"

        def move(self, weight, state, grad, group, ahead):
            partial = ahead.in_progress
            return None if partial is None else Move((Term(ahead.lr_sum / partial.seen, partial.value),))

    try:
        weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
        optimizer = Follower(weights, lr=0.5)
        partial = PartialGradient(torch.tensor([1.0, 2.0]), seen=0.25)
        horizon = Horizon(2, next_rates(optimizer, None, 2), scales=[0.5], in_progress=[partial, None])
        out = buffers(optimizer)
        predict_by_rule(parameter_entries(optimizer, "refined"), [None, None], horizon, out)
        assert torch.equal(out[0], 1.0 - 0.5 * (0.5 * 2 / 0.25) * partial.value)
        assert torch.equal(out[1], torch.ones(2))
    finally:
        del RULES[Follower]


def test_groups_of_displacements_keep_their_own_places_on_their_lines() -> None:
    """Predictions overwrite the points that they are made from, also in a state that is saved and loaded in between."""
    torch.manual_seed(0)
    optimizer = Lion([{"params": [torch.nn.Parameter(torch.randn(5, dtype=torch.float64))]} for _ in "ab"])
    predictor, spare = Predictor(optimizer), buffers(optimizer)
    for seed in range(2):
        set_random_grads(optimizer, seed)
        before = values_of(optimizer)
        predictor.before_step(spare)
        optimizer.step()
        predictor.after_step()
    scales = predictor.scales = (0.5, 1.5)
    for steps in (2, 4):
        predictor.predict_into(spare, steps)
        for found, w, b, scale in zip(spare, values_of(optimizer), before, scales, strict=True):
            torch.testing.assert_close(found, w + scale * steps * (w - b), rtol=1e-12, atol=1e-12)
        state = predictor.state_dict()
        assert state["known_at"] == [0.5 * steps, 1.5 * steps]
        split = rebuilt(split_predictor(state, ["a", "b"]))
        for k, names in ((0, ["a", "b"]), (1, ["b", "a"])):  # the same stage, and another one that has them the other way round
            joined = joined_predictor(state, names, {0: split}, same_cut=k == 0)
            assert joined["known_at"] == (state["known_at"] if k == 0 else state["known_at"][::-1])
        predictor = Predictor(optimizer)
        predictor.scales = scales
        predictor.load_state_dict(joined_predictor(state, ["a", "b"], {0: split}, same_cut=True))


def rebuilt(split: dict[str, Any]) -> dict[str, Any]:
    """As it comes from a checkpoint."""
    tensors: dict[str, Tensor] = {}
    return rebuild(flatten(split, "at", tensors), tensors)


def test_state_saved_before_predictions_had_a_scale_is_loaded() -> None:
    """Its place on the line of displacements is an int there."""
    optimizer = Lion([torch.nn.Parameter(torch.ones(3))])
    predictor = Predictor(optimizer)
    old = {"kinds": ["displacement"], "grads": None, "known": [torch.zeros(3)], "known_at": -1}
    predictor.load_state_dict(old)
    assert predictor.state_dict().keys() == old.keys()
    out = buffers(optimizer)
    predictor.predict_into(out, 2)
    assert torch.equal(out[0], torch.full((3,), 3.0))
