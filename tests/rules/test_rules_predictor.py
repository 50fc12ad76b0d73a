"""The engine side: predictions into buffers, the two-copies promise, and a bit-for-bit resume."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.optim import Optimizer

from pipeoptim.errors import ConfigError
from pipeoptim.rules import RULES, Predictor, predict_weights
from pipeoptim.rules.registry import RULE_KINDS
from rules_cases import (
    BY_NAME,
    CASES,
    Case,
    Lion,
    half_seen,
    largest_difference,
    set_random_grads,
    train,
    values_of,
    weights_of,
)


def buffers(optimizer: Optimizer) -> list[Tensor]:
    return [torch.full_like(w, float("nan")) for w in values_of(optimizer)]


def update(predictor: Predictor, spare: list[Tensor] | None, seed: int) -> None:
    """What an engine does per update; gradients are dropped, not zeroed."""
    set_random_grads(predictor.optimizer, seed)
    predictor.before_step(spare)
    predictor.optimizer.step()
    predictor.after_step()
    predictor.optimizer.zero_grad(set_to_none=True)


def lion(seed: int = 0) -> Optimizer:
    torch.manual_seed(seed)
    return Lion(
        [torch.nn.Parameter(torch.randn(4, 3, dtype=torch.float64)), torch.nn.Parameter(torch.randn(5, dtype=torch.float64))]
    )


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(CASES), st.data())
def test_equals_predict_weights_bit_for_bit_although_gradients_are_gone(case: Case, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from([k for k in RULES[case.cls].kinds if k in RULE_KINDS]))
    steps, updates = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 3))
    optimizer, twin = case.make(), case.make()
    predictor = Predictor(optimizer, kind=kind)
    spare = buffers(optimizer)
    for number in range(updates):
        update(predictor, spare, 100 + number)
    train(twin, updates)
    known = half_seen(twin, kind)
    predictor.predict_into(spare, steps, **known)
    expected = predict_weights(twin, steps, kind=kind, **known)
    assert all(torch.equal(a, b) for a, b in zip(spare, expected, strict=True))


@pytest.mark.parametrize("make", [BY_NAME["adamw"].make, BY_NAME["sgd"].make, lion])
def test_displacement_in_every_order_of_calls(make: object) -> None:
    """W + s d, whether `out` is the spare with W_{t-1}, the spare with an earlier prediction, or another list."""
    optimizer = make()  # type: ignore[operator]
    predictor = Predictor(optimizer, kind="displacement")
    assert not predictor.needs_grad
    assert predictor.needs_previous
    spare, other = buffers(optimizer), buffers(optimizer)
    predictor.predict_into(spare, 4)
    assert all(torch.equal(a, b) for a, b in zip(spare, values_of(optimizer), strict=True))
    for seed, calls in enumerate(
        [
            [(0, 3)],
            [(0, 3), (0, 1), (0, 5)],
            [(1, 2), (0, 2), (1, 7)],
            [(0, 0), (0, 2)],
            [(1, 0), (0, 1), (1, 4), (0, 0), (0, 6)],
        ]
    ):
        old = values_of(optimizer)
        update(predictor, spare, seed)
        new = values_of(optimizer)
        for which, steps in calls:
            out = other if which else spare
            predictor.predict_into(out, steps)
            expected = [n + steps * (n - o) for n, o in zip(new, old, strict=True)]
            assert largest_difference(out, expected) < 1e-13
            assert largest_difference(new, values_of(optimizer)) == 0
            if steps == 0:
                assert all(torch.equal(a, b) for a, b in zip(out, new, strict=True))


def test_displacement_without_spare_predicts_nothing() -> None:
    optimizer = lion()
    predictor = Predictor(optimizer)
    update(predictor, None, 0)
    out = buffers(optimizer)
    predictor.predict_into(out, 3)
    assert all(torch.equal(a, b) for a, b in zip(out, values_of(optimizer), strict=True))


def test_optimizer_without_a_rule_uses_the_last_displacement() -> None:
    optimizer = lion()
    predictor = Predictor(optimizer)
    spare = buffers(optimizer)
    update(predictor, spare, 0)
    old = values_of(optimizer)
    update(predictor, spare, 1)
    predictor.predict_into(spare, 3)
    expected = [n + 3 * (n - o) for n, o in zip(values_of(optimizer), old, strict=True)]
    assert largest_difference(spare, expected) < 1e-13


def test_needs_grad_is_true_only_where_the_state_holds_no_direction() -> None:
    def needs(name: str, kind: str = "refined") -> bool:
        return Predictor(BY_NAME[name].make(), kind=kind).needs_grad

    assert needs("sgd")
    assert needs("sgd", "paper")
    assert not needs("sgd", "decayed")
    assert not needs("sgd_momentum")
    assert needs("sgd_nesterov")
    assert not needs("sgd_nesterov", "paper")
    assert not needs("adamw")
    assert not needs("sgd", "displacement")


def test_only_gradients_that_a_rule_needs_are_kept_and_not_copied() -> None:
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:], "momentum": 0.9}], lr=0.1)
    predictor = Predictor(optimizer)
    grads = [torch.ones(2), torch.ones(2)]
    for weight, grad in zip(weights, grads, strict=True):
        weight.grad = grad
    optimizer.step()
    predictor.after_step()
    kept = predictor._grads
    assert kept is not None
    assert kept[0] is grads[0]
    assert kept[1] is None


class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts elements in storages that did not exist before."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("kind", ["refined", "paper", "displacement"])
@pytest.mark.parametrize(
    "name", ["sgd", "sgd_momentum", "sgd_nesterov_decay", "adam", "adamw", "adam_amsgrad", "rmsprop_momentum"]
)
def test_common_rules_allocate_no_tensor_on_a_cpu(name: str, kind: str) -> None:
    optimizer = BY_NAME[name].make()
    predictor = Predictor(optimizer, kind=kind)
    spare = buffers(optimizer)
    update(predictor, spare, 0)
    update(predictor, spare, 1)
    states = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    grads = [g for g in (predictor._grads or []) if g is not None]
    with Allocations([*spare, *weights_of(optimizer), *states, *grads]) as count:
        predictor.predict_into(spare, 3)
    assert count.largest <= 1  # at most scalars


@pytest.mark.parametrize("kind", ["refined", "displacement"])
@pytest.mark.parametrize("name", ["sgd", "sgd_nesterov", "adamw", "adagrad", "lion"])
@pytest.mark.parametrize("predicted_before_saving", [False, True])
def test_resume_predicts_the_same_bits(name: str, kind: str, predicted_before_saving: bool) -> None:
    def fresh() -> tuple[Predictor, list[Tensor]]:
        optimizer = lion() if name == "lion" else BY_NAME[name].make()
        return Predictor(optimizer, kind=kind), buffers(optimizer)

    predictor, spare = fresh()
    for seed in range(3):
        update(predictor, spare, seed)
    if predicted_before_saving:
        predictor.predict_into(spare, 4)
    file = io.BytesIO()
    torch.save(
        {
            "predictor": predictor.state_dict(),
            "optimizer": predictor.optimizer.state_dict(),
            "w": values_of(predictor.optimizer),
        },
        file,
    )
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    resumed, other = fresh()
    for weight, value in zip(weights_of(resumed.optimizer), saved["w"], strict=True):
        weight.data.copy_(value)
    resumed.optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
    resumed.load_state_dict(saved["predictor"])
    for p, out in ((predictor, spare), (resumed, other)):
        p.predict_into(out, 2)
        p.predict_into(out, 5)
        p.predict_into(out, 1)
    assert all(torch.equal(a, b) for a, b in zip(spare, other, strict=True))
    for p, out in ((predictor, spare), (resumed, other)):
        update(p, out, 9)
        p.predict_into(out, 3)
    assert all(torch.equal(a, b) for a, b in zip(spare, other, strict=True))
    points = resumed._displacements.points
    assert points is None or all(a is b for a, b in zip(points, other, strict=True))  # no third copy kept


def test_state_is_a_snapshot() -> None:
    optimizer = lion()
    predictor = Predictor(optimizer)
    spare = buffers(optimizer)
    update(predictor, spare, 0)
    state = predictor.state_dict()
    kept = [t.clone() for t in state["known"]]
    predictor.predict_into(spare, 3)
    assert all(torch.equal(a, b) for a, b in zip(state["known"], kept, strict=True))


def test_wrong_buffers_and_wrong_state_are_refused() -> None:
    optimizer = BY_NAME["adamw"].make()
    train(optimizer, 1)
    predictor = Predictor(optimizer)
    with pytest.raises(ConfigError, match="one buffer per parameter"):
        predictor.predict_into(buffers(optimizer)[:1], 1)
    with pytest.raises(ConfigError, match="cannot hold a parameter"):
        predictor.predict_into([torch.empty(1, dtype=torch.float64)] * 3, 1)
    with pytest.raises(ConfigError, match="must not overwrite"):
        predictor.predict_into(weights_of(optimizer), 1)
    with pytest.raises(ConfigError, match="negative"):
        predictor.predict_into(buffers(optimizer), -1)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        predictor.load_state_dict(Predictor(optimizer, kind="paper").state_dict())
    moved = Predictor(optimizer, kind="displacement")
    spare = buffers(optimizer)
    moved.before_step(spare)
    with pytest.raises(ConfigError, match="pass all of them"):
        moved.predict_into([spare[0], *buffers(optimizer)[1:]], 1)


def test_buffers_may_require_grad() -> None:
    """An engine may run F on buffers that are parameters themselves."""
    for name in ("adamw", "sgd_momentum", "nadam"):
        for kind in ("refined", "displacement"):
            optimizer = BY_NAME[name].make()
            predictor = Predictor(optimizer, kind=kind)
            spare = [torch.nn.Parameter(b) for b in buffers(optimizer)]
            update(predictor, spare, 0)  # type: ignore[arg-type]
            predictor.predict_into(spare, 2)
            assert all(bool(torch.isfinite(b).all()) and b.requires_grad and b.is_leaf for b in spare)
