"""What holds for every rule: it changes nothing, keeps the form of the weights, honours groups, and its paths agree."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.optim import Optimizer

from pipeoptim.optim import RotatedAdam
from pipeoptim.rules import RULES, Predictor, find_rule, predict_weights
from pipeoptim.rules.entries import parameter_entries
from pipeoptim.rules.horizon import Horizon
from pipeoptim.rules.interpreters import ApplyMode
from pipeoptim.rules.lr import next_rates
from pipeoptim.rules.registry import RULE_KINDS
from pipeoptim.rules.rule_moves import predict_by_rule
from rules_cases import (
    BY_NAME,
    CASES,
    Case,
    half_seen,
    largest_difference,
    really_stepped,
    set_random_grads,
    train,
    values_of,
    weights_of,
)

KINDS = ("refined", "paper", "decayed", "in_progress", "displacement")


def offered(case: Case) -> tuple[str, ...]:
    return RULES[case.cls].kinds


def by_rule(cls: type[Optimizer]) -> list[str]:
    return [kind for kind in RULES[cls].kinds if kind in RULE_KINDS]


def write(optimizer: Optimizer, steps: int, kind: str, out: list[Tensor], mode: ApplyMode) -> None:
    grads = [w.grad for w in weights_of(optimizer)]
    horizon = Horizon(steps, next_rates(optimizer, None, steps), **half_seen(optimizer, kind))
    predict_by_rule(parameter_entries(optimizer, kind), grads, horizon, out, mode)


def snapshot(optimizer: Optimizer) -> tuple[Any, ...]:
    return (
        copy.deepcopy(optimizer.state_dict()),
        len(optimizer.state),
        values_of(optimizer),
        [None if w.grad is None else w.grad.clone() for w in weights_of(optimizer)],
        torch.get_rng_state(),
        [w._version for w in weights_of(optimizer)],
    )


def same(first: Any, second: Any) -> bool:
    """Bit for bit, through containers."""
    if isinstance(first, Tensor):
        return first.dtype == second.dtype and first.stride() == second.stride() and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))
    return bool(first == second)


@pytest.mark.filterwarnings("ignore:.*last displacement is unknown")
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_prediction_is_pure_and_aliases_nothing(data: st.DataObject) -> None:
    case = data.draw(st.sampled_from(CASES), label="case")
    kind = data.draw(st.sampled_from(offered(case)), label="kind")
    steps = data.draw(st.integers(0, 5), label="steps")
    optimizer = case.make(data.draw(st.integers(0, 9), label="seed"))
    train(optimizer, data.draw(st.integers(0, 4), label="updates"))
    if data.draw(st.booleans(), label="grads gone"):
        optimizer.zero_grad()
    scheduled = data.draw(st.booleans(), label="scheduler")
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5) if scheduled else None
    before = snapshot(optimizer)
    known = half_seen(optimizer, kind)
    predicted = predict_weights(optimizer, steps, kind=kind, scheduler=scheduler, **known)
    assert same(before, snapshot(optimizer))
    again = predict_weights(optimizer, steps, kind=kind, scheduler=scheduler, **known)
    assert same(predicted, again)
    for tensor in predicted:
        assert not tensor.requires_grad
        tensor.fill_(float("nan"))
    assert same(before, snapshot(optimizer))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(CASES), st.integers(0, 3), st.data())
def test_no_step_ahead_is_the_weights_bit_for_bit(case: Case, updates: int, data: st.DataObject) -> None:
    optimizer = case.make(dtype=torch.float32 if case.name != "adam_tensor_lr" else torch.float64)
    train(optimizer, updates)
    kind = data.draw(st.sampled_from(offered(case)))
    assert same(predict_weights(optimizer, 0, kind=kind), values_of(optimizer))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_before_the_first_update_the_weights_themselves(case: Case) -> None:
    optimizer = case.make()
    for kind in offered(case):
        assert same(predict_weights(optimizer, 3, kind=kind), values_of(optimizer))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(CASES), st.sampled_from(KINDS[:4]), st.integers(1, 4), st.integers(1, 5))
def test_fast_paths_equal_the_plain_path(case: Case, kind: str, updates: int, steps: int) -> None:
    if kind not in offered(case):
        kind = "refined"
    optimizer = case.make()
    train(optimizer, updates)
    results = {}
    for mode in ("plain", "in_place", "foreach", "auto"):
        out = [torch.full_like(w, float("nan")) for w in values_of(optimizer)]
        write(optimizer, steps, kind, out, mode)
        results[mode] = out
    scale = max(1.0, *(float(w.abs().max()) for w in results["plain"]))
    for mode in ("in_place", "foreach", "auto"):
        assert largest_difference(results[mode], results["plain"]) <= 1e-14 * scale * steps


def test_foreach_blocks_are_flushed_when_full(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = BY_NAME["adamw"].make()
    train(optimizer, 3)
    sizes: list[int] = []
    from pipeoptim.rules import interpreters

    real = interpreters.apply_foreach
    monkeypatch.setattr(interpreters, "BLOCK_ELEMENTS", 13)
    monkeypatch.setattr(interpreters, "apply_foreach", lambda w, m, o: (sizes.append(len(w)), real(w, m, o))[1])
    out = [torch.empty_like(w) for w in values_of(optimizer)]
    write(optimizer, 2, "refined", out, "foreach")
    assert sizes == [2, 1]  # 12 + 5 elements fill a block
    assert largest_difference(out, predict_weights(optimizer, 2)) < 1e-14


# ---- form: dtype, memory format, complex -----------------------------------------------------------------------------------


def shaped_like(name: str) -> Tensor:
    torch.manual_seed(1)
    image = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    return {
        "channels_last": image.contiguous(memory_format=torch.channels_last),
        "transposed": torch.randn(6, 4, dtype=torch.float64).t(),
        "permuted": image.permute(3, 0, 2, 1),
        "scalar": torch.randn((), dtype=torch.float64),
        "empty": torch.randn(0, 3, dtype=torch.float64),
        "sliced": torch.randn(6, 8, dtype=torch.float64)[:, ::2],
    }[name]


@pytest.mark.parametrize("form", ["channels_last", "transposed", "permuted", "scalar", "empty", "sliced"])
@pytest.mark.parametrize("name", ["sgd_nesterov_decay", "adamw", "adam_amsgrad", "nadam", "rmsprop", "adafactor"])
def test_memory_format_is_kept_and_values_do_not_depend_on_it(name: str, form: str) -> None:
    if (name, form) == ("adafactor", "empty"):
        pytest.skip("torch's own Adafactor divides by the number of elements")
    case = BY_NAME[name]
    odd = torch.nn.Parameter(shaped_like(form))
    plain = torch.nn.Parameter(shaped_like(form).contiguous())
    optimizers = [case.cls([w], **case.settings) for w in (odd, plain)]
    results = []
    for optimizer in optimizers:
        for update in range(3):
            set_random_grads(optimizer, update)
            optimizer.step()
        results.append([predict_weights(optimizer, 3, kind=k)[0] for k in ("refined", "paper")])
    for got, reference in zip(*results, strict=True):
        assert got.shape == odd.shape
        assert got.stride() == torch.empty_like(odd).stride()
        torch.testing.assert_close(got, reference, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [c for c in CASES if "tensor_lr" not in c.name], ids=lambda c: c.name)
def test_dtype_is_kept(case: Case, dtype: torch.dtype) -> None:
    optimizer = case.make(dtype=dtype)
    train(optimizer, 3)
    for kind in offered(case):
        for got, weight in zip(predict_weights(optimizer, 2, kind=kind), weights_of(optimizer), strict=True):
            assert got.dtype == dtype
            assert bool(torch.isfinite(got).all()) or dtype == torch.float16  # eps underflows in half precision, as in torch
            assert got.device == weight.device


COMPLEX = [c for c in CASES if c.cls not in (torch.optim.Adafactor, torch.optim.Muon) and c.name != "adam_fused"]


@pytest.mark.parametrize("case", COMPLEX, ids=lambda c: c.name)
def test_complex_weights_move_as_their_real_views(case: Case) -> None:
    torch.manual_seed(3)
    weight = torch.nn.Parameter(torch.randn(4, 3, dtype=torch.complex128))
    settings = {**case.settings, **({} if case.cls is torch.optim.SGD else {"foreach": False})}
    optimizer = case.cls([weight], **settings)  # type: ignore[call-arg]
    previous = weight.detach().clone()
    for _ in range(2):
        weight.grad = torch.randn(4, 3, dtype=torch.complex128)
        previous = weight.detach().clone()
        optimizer.step()
    before = snapshot(optimizer)
    for kind in offered(case):
        assert predict_weights(optimizer, 2, kind=kind)[0].dtype == torch.complex128
    assert same(before, snapshot(optimizer))
    if case.repeats:
        expected = weight.detach() + 2 * (weight.detach() - previous)
        torch.testing.assert_close(predict_weights(optimizer, 2)[0], expected, rtol=0, atol=1e-10)
    predictor = Predictor(optimizer, kind="displacement")
    spare = [torch.empty_like(weight.detach())]
    predictor.before_step(spare)
    old = weight.detach().clone()
    optimizer.step()
    predictor.after_step()
    predictor.predict_into(spare, 3)
    torch.testing.assert_close(spare[0], weight.detach() + 3 * (weight.detach() - old), rtol=0, atol=1e-12)


# ---- groups, missing state, frozen weights, tensor hyperparameters -----------------------------------------------------------

GROUPS: dict[type[Optimizer], tuple[dict[str, Any], dict[str, Any]]] = {
    torch.optim.SGD: ({"lr": 0.1}, {"lr": 0.02, "momentum": 0.7, "weight_decay": 0.1}),
    torch.optim.Adam: (
        {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-2},
        {"lr": 0.02, "betas": (0.5, 0.6), "eps": 1e-6, "amsgrad": True},
    ),
    torch.optim.AdamW: ({"lr": 0.1, "weight_decay": 0.0}, {"lr": 0.02, "weight_decay": 0.3, "maximize": True}),
    torch.optim.NAdam: ({"lr": 0.1, "momentum_decay": 0.1}, {"lr": 0.02, "betas": (0.5, 0.6)}),
    RotatedAdam: (
        {"lr": 0.1, "weight_decay": 0.0},
        {"lr": 0.02, "sides": "unilateral", "betas": (0.5, 0.6), "refresh_every": 1},
    ),
    torch.optim.RAdam: ({"lr": 0.1, "betas": (0.9, 0.6)}, {"lr": 0.02, "eps": 1e-2}),
    torch.optim.Adamax: ({"lr": 0.1, "betas": (0.5, 0.6)}, {"lr": 0.02}),
    torch.optim.Adagrad: ({"lr": 0.1, "eps": 1e-2}, {"lr": 0.02, "lr_decay": 0.3}),
    torch.optim.Adadelta: ({"lr": 0.1, "rho": 0.5}, {"lr": 0.02, "eps": 1e-2}),
    torch.optim.RMSprop: ({"lr": 0.1}, {"lr": 0.02, "momentum": 0.7, "alpha": 0.5}),
    torch.optim.Rprop: ({"lr": 0.1}, {"lr": 0.02, "etas": (0.3, 1.5)}),
    torch.optim.ASGD: ({"lr": 0.1}, {"lr": 0.02, "lambd": 0.2}),
    torch.optim.Adafactor: ({"lr": 0.1}, {"lr": 0.02, "d": 2.0, "weight_decay": 0.3}),
    torch.optim.Muon: ({"lr": 0.1}, {"lr": 0.02, "nesterov": False, "weight_decay": 0.3}),
}


@pytest.mark.parametrize("cls", RULES, ids=lambda c: c.__name__)
def test_param_groups_are_honoured(cls: type[Optimizer]) -> None:
    """Two groups in one optimizer predict what two optimizers predict."""

    def weights() -> list[torch.nn.Parameter]:
        torch.manual_seed(5)
        return [torch.nn.Parameter(torch.randn(3, 4, dtype=torch.float64)) for _ in range(3)]

    first, second = GROUPS[cls]
    a, b = weights(), weights()
    together = cls([{"params": a[:1], **first}, {"params": a[1:], **second}])  # type: ignore[call-arg]
    apart = [cls(b[:1], **first), cls(b[1:], **second)]  # type: ignore[call-arg]
    for update in range(3):
        torch.manual_seed(update)
        for x, y in zip(a, b, strict=True):
            x.grad = torch.randn(3, 4, dtype=torch.float64)
            y.grad = x.grad.clone()
        for optimizer in (together, *apart):
            optimizer.step()
    for kind in by_rule(cls):
        got = predict_weights(together, 2, kind=kind, **half_seen(together, kind))
        expected = [w for one in apart for w in predict_weights(one, 2, kind=kind, **half_seen(one, kind))]
        assert same(got, expected)
        assert largest_difference(got, values_of(together)) > 1e-5
        blocks = [torch.empty_like(w) for w in got]
        write(together, 2, kind, blocks, "foreach")
        assert largest_difference(blocks, got) < 1e-13


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_weights_without_state_and_frozen_weights_stay(case: Case) -> None:
    optimizer = case.make()
    first, second, *_ = weights_of(optimizer)
    frozen_later = first
    for update in range(3):
        set_random_grads(optimizer, update)
        second.grad = None
        optimizer.step()
    frozen_later.requires_grad_(False)
    frozen_later.grad = None
    for kind in by_rule(case.cls):
        got = predict_weights(optimizer, 3, kind=kind)
        assert torch.equal(got[0], first)
        assert torch.equal(got[1], second)


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.AdamW])
def test_tensor_learning_rate_and_betas(cls: type[Optimizer]) -> None:
    settings = {"lr": 0.05, "betas": (0.7, 0.8), "weight_decay": 0.1, "foreach": False}
    exact = {
        **settings,
        "lr": torch.tensor(0.05, dtype=torch.float64),
        "betas": (torch.tensor(0.7, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64)),
    }
    results = []
    for chosen in (settings, exact):
        optimizer = Case("", cls, chosen).make()
        train(optimizer, 3)
        results.append([predict_weights(optimizer, 3, kind=kind) for kind in ("refined", "paper", "decayed")])
    for plain, tensor in zip(*results, strict=True):
        assert largest_difference(plain, tensor) < 1e-12


def test_scalars_that_cannot_be_read_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an accelerator lr, betas and step counts stay tensors. Here: CPU tensors that are never turned into floats."""
    from pipeoptim.rules import adam, lr, move, sgd

    cases = [(BY_NAME[name], kind) for name in ("adamw", "adam_amsgrad", "sgd_momentum", "sgd_decay") for kind in KINDS[:4]]

    def predictions(as_tensor: bool) -> list[list[Tensor]]:
        results = []
        for case, kind in cases:
            optimizer = case.make()
            train(optimizer, 3)
            if as_tensor:
                for group in optimizer.param_groups:
                    group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
            results.append(predict_weights(optimizer, 3, kind=kind, **half_seen(optimizer, kind)))
        return results

    expected = predictions(False)

    def unread(value: Any) -> Any:
        return value.detach().reshape(()).double() if isinstance(value, Tensor) else float(value)

    for module in (adam, lr, move, sgd):
        monkeypatch.setattr(module, "scalar", unread)
    for got, reference in zip(predictions(True), expected, strict=True):
        assert largest_difference(got, reference) < 1e-12


def test_gone_gradients_use_what_the_state_still_holds() -> None:
    for name, stays in [
        ("sgd", True),
        ("rmsprop", True),
        ("adagrad", True),
        ("sgd_nesterov", False),
        ("nadam", False),
        ("rprop", False),
    ]:
        optimizer = BY_NAME[name].make()
        train(optimizer, 5, constant=True)
        with_grads = predict_weights(optimizer, 2)
        optimizer.zero_grad()
        without = predict_weights(optimizer, 2)
        assert same(without, values_of(optimizer)) == stays
        if name in ("nadam", "rprop"):  # the running mean, and the last sign, are what the constant gradient was
            assert largest_difference(without, with_grads) < 1e-10


def test_subclass_that_keeps_step_is_predicted_and_one_that_changes_it_is_not() -> None:
    class Renamed(torch.optim.AdamW):
        pass

    class Different(torch.optim.AdamW):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for weight in weights_of(self):
                weight.sub_(torch.ones_like(weight))

    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    assert find_rule(Renamed([weight])) is RULES[torch.optim.AdamW]
    different = Different([weight])
    assert find_rule(different) is None
    weight.grad = torch.ones_like(weight)
    assert largest_difference(predict_weights(different, 2), really_stepped(different, 2)) == 0
    assert predict_weights(different, 2)[0].tolist() == [-2.0, -2.0]
