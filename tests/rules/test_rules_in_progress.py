"""The kind "in_progress": a dry step of the real optimizer on the gradient that the mini-batch in progress lets expect."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.optim import Optimizer

from pipeoptim.errors import ConfigError
from pipeoptim.optim import RotatedAdam
from pipeoptim.rules import REFUSED, RULES, ClipEstimate, CombinedOptimizer, PartialGradient, Predictor, predict_weights
from pipeoptim.rules.fallback import copy_optimizer
from rules_cases import BY_NAME, CASES, Case, Lion, largest_difference, train, values_of, weights_of
from test_rules_properties import same, snapshot

TORCH = [
    cls
    for _, cls in inspect.getmembers(torch.optim, inspect.isclass)
    if issubclass(cls, Optimizer) and cls is not Optimizer and cls not in REFUSED
]
"""Every optimizer of the module, those of a later torch as well."""

ALL = list(dict.fromkeys([*TORCH, *RULES, Lion]))


def gradients(optimizer: Optimizer, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.empty_like(w).copy_(torch.randn(w.shape, generator=generator, dtype=torch.float64)) for w in values_of(optimizer)
    ]


def really_stepped(optimizer: Optimizer, grads: Sequence[Tensor | None]) -> list[Tensor]:
    """The oracle: the optimizer's own step, carried out on a copy."""
    twin, values = copy_optimizer(optimizer)
    for weight, grad in zip(weights_of(twin), grads, strict=True):
        weight.grad = None if grad is None else grad.clone()
    twin.step()
    return values


def whole(grads: list[Tensor]) -> list[PartialGradient | None]:
    return [PartialGradient(g, 1.0) for g in grads]


def tolerance(optimizer: Optimizer) -> float:
    """A few units in the last place of weights and displacements of order 1; bfloat16 inside Muon and SGD's private sums."""
    return 64 * torch.finfo(weights_of(optimizer)[0].dtype).eps


OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "weight_decay": st.sampled_from([0.0, 0.1]),
    "momentum": st.sampled_from([0.0, 0.5, 0.9]),
    "dampening": st.sampled_from([0.0, 0.3]),
    "nesterov": st.booleans(),
    "maximize": st.booleans(),
    "amsgrad": st.booleans(),
    "centered": st.booleans(),
    "decoupled_weight_decay": st.booleans(),
    "lr_decay": st.sampled_from([0.0, 0.1]),
    "lambd": st.sampled_from([0.0, 0.1]),
    "foreach": st.sampled_from([None, False, True]),
    "betas": st.sampled_from([(0.9, 0.99), (0.5, 0.6)]),
    "refresh_every": st.sampled_from([1, 3]),
    "alpha": st.sampled_from([0.6, 0.9]),
}
"""Arguments of constructors: those of these names that a class has are drawn."""


def drawn_options(data: st.DataObject, cls: type[Optimizer]) -> dict[str, Any]:
    names = [name for name in OPTIONS if name in inspect.signature(cls).parameters and (cls, name) != (Lion, "betas")]
    options = {name: data.draw(OPTIONS[name], label=name) for name in names}
    if cls is torch.optim.SGD and options["nesterov"]:
        options |= {"momentum": 0.9, "dampening": 0.0}
    if cls in (torch.optim.Muon, torch.optim.Adafactor):  # neither takes foreach=True with what it is given here
        options.pop("foreach", None)
    return {"lr": 0.02, **options}


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_with_the_whole_mini_batch_it_is_the_real_step(cls: type[Optimizer], data: st.DataObject) -> None:
    complex_too = cls not in (torch.optim.Muon, torch.optim.Adafactor, RotatedAdam, Lion)
    dtype = data.draw(
        st.sampled_from([torch.float32, torch.float64, *([torch.complex128] if complex_too else [])]), label="dtype"
    )
    shapes = ((4, 3), (3, 6)) if cls is torch.optim.Muon else ((4, 3), (5,), (2, 3, 2, 2))
    torch.manual_seed(1)
    parameters = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    options = drawn_options(data, cls)
    optimizer = cls([{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.05}], **options)  # type: ignore[call-arg]
    updates = data.draw(st.integers(0, 8), label="updates")  # RAdam's form changes on the way
    generator = torch.Generator().manual_seed(2)
    for _ in range(updates):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator, dtype=dtype)
        optimizer.step()
    grads = [torch.randn(p.shape, generator=generator, dtype=dtype) for p in parameters]
    before = snapshot(optimizer)
    predicted = predict_weights(optimizer, 1, kind="in_progress", in_progress=whole(grads))
    assert same(before, snapshot(optimizer))
    for got, real in zip(predicted, really_stepped(optimizer, grads), strict=True):
        torch.testing.assert_close(got, real, rtol=0, atol=tolerance(optimizer))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_setting_at_the_whole_mini_batch(case: Case) -> None:
    for updates in (0, 1, 5):
        optimizer = case.make()
        train(optimizer, updates)
        grads = gradients(optimizer, 7)
        predicted = predict_weights(optimizer, 1, kind="in_progress", in_progress=whole(grads))
        assert largest_difference(predicted, really_stepped(optimizer, grads)) <= tolerance(optimizer)
        assert largest_difference(predicted, values_of(optimizer)) > 1e-7


# ---- the formula, written down independently in float64 -------------------------------------------------------------------------


def adamw(w: float, m: float, v: float, t: int, g: float, lr: float, rates: list[float], wd: float) -> float:
    """By hand: AdamW with betas (0.8, 0.9), eps 1e-3; `rates` of the further steps along the same direction."""
    t += 1
    m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
    direction = m / (1 - 0.8**t) / (math.sqrt(v / (1 - 0.9**t)) + 1e-3)
    return w - (lr + sum(rates)) * (direction + wd * w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("seen", [0.0, 0.25, 0.875])
def test_adamw_by_hand(seen: float, steps: int, dtype: torch.dtype) -> None:
    weight = torch.nn.Parameter(torch.tensor([1.5, -2.0], dtype=dtype))
    optimizer = torch.optim.AdamW([weight], lr=0.08, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for gradient in ([0.3, -0.7], [0.5, 0.2]):
        weight.grad = torch.tensor(gradient, dtype=dtype)
        optimizer.step()
        scheduler.step()
    value = torch.tensor([0.11, 0.42], dtype=dtype)
    known = [PartialGradient(value, seen) if seen else None]
    got = predict_weights(optimizer, steps, kind="in_progress", in_progress=known, scheduler=scheduler)[0]
    for i, (g1, g2) in enumerate(((0.3, 0.5), (-0.7, 0.2))):
        m, v = 0.8 * 0.2 * g1 + 0.2 * g2, 0.9 * 0.1 * g1 * g1 + 0.1 * g2 * g2
        g = (float(value[i]) if seen else 0.0) + (1 - seen) * m / (1 - 0.8**2)
        rates = [0.02 * 0.5**n for n in range(1, steps)]  # 0.08 and 0.04 are used up
        expected = adamw(float(weight.detach()[i]), m, v, 2, g, 0.02, rates, 0.1)
        assert float(got[i]) == pytest.approx(expected, rel=4e-7 if dtype is torch.float32 else 1e-14)


@pytest.mark.parametrize("maximize", [False, True])
def test_momentum_with_coupled_decay_by_hand(maximize: bool) -> None:
    """The momentum holds decayed gradients; the estimate is one of the gradient itself, which the step then decays."""
    weight = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.6, dampening=0.2, weight_decay=0.05, maximize=maximize)
    sign, w, buffer = (-1 if maximize else 1), 2.0, None
    for g in (0.3, -0.8):
        weight.grad = torch.tensor([g], dtype=torch.float64)
        optimizer.step()
        d = sign * g + 0.05 * w
        buffer = d if buffer is None else 0.6 * buffer + 0.8 * d
        w -= 0.1 * buffer
    assert buffer is not None
    partial = PartialGradient(torch.tensor([2.0], dtype=torch.float64), 0.25, factor=0.2)  # 0.4, scaled by 5
    got = predict_weights(optimizer, 3, kind="in_progress", in_progress=[partial])[0]
    mean = sign * (buffer * 0.4 / 0.8 - 0.05 * w)
    d = sign * (0.4 + 0.75 * mean) + 0.05 * w
    assert float(got) == pytest.approx(w - 3 * 0.1 * (0.6 * buffer + 0.8 * d), rel=1e-14)


def test_without_momentum_the_rest_is_shrunk_to_what_is_seen() -> None:
    optimizer = BY_NAME["sgd"].make()
    train(optimizer, 2)
    grads = gradients(optimizer, 3)
    got = predict_weights(optimizer, 1, kind="in_progress", in_progress=[PartialGradient(g, 0.25) for g in grads])
    expected = [w - 0.1 * (g + 0.75 * 0.25 * (g / 0.25)) for w, g in zip(values_of(optimizer), grads, strict=True)]
    assert largest_difference(got, expected) < 1e-14
    for nothing in ((), [None] * len(grads), [PartialGradient(g, 0.0) for g in grads]):
        assert same(predict_weights(optimizer, 1, kind="in_progress", in_progress=nothing), values_of(optimizer))


# ---- what stands for the micro-batches to come, from the history of gradients instead of the state -------------------------------

History = list[tuple[Tensor, Tensor]]
"""Of every update so far the gradient and the weight it was taken with."""


def running_mean(history: History, now: Tensor, decay: float, *, corrected: bool = True, weight_decay: float = 0.0) -> Tensor:
    """``(1 - decay) sum decay^(t-i) g_i``, by default over ``1 - decay^t``; of coupled decay remains what W has changed since."""
    t = len(history)
    total = sum((1 - decay) * decay ** (t - i) * (g + weight_decay * w) for i, (g, w) in enumerate(history, start=1))
    assert isinstance(total, Tensor)
    return total / (1 - decay**t if corrected else 1) - weight_decay * now


def normalized_mean(history: History, momentum: float, alpha: float, eps: float) -> Tensor:
    """RMSprop's buffer, in the units of a gradient."""
    square = buffer = torch.zeros_like(history[0][0])
    for g, _ in history:
        square = alpha * square + (1 - alpha) * g * g
        buffer = momentum * buffer + g / (square.sqrt() + eps)
    return (1 - momentum) * buffer * (square.sqrt() + eps)


optim = torch.optim
MEANS: dict[str, tuple[type[Optimizer], dict[str, Any], Any]] = {
    "adam": (optim.Adam, {"betas": (0.8, 0.9)}, lambda h, w: running_mean(h, w, 0.8)),
    "adam_coupled": (optim.Adam, {"weight_decay": 0.3}, lambda h, w: running_mean(h, w, 0.9, weight_decay=0.3)),
    "adamw": (optim.AdamW, {"weight_decay": 0.3, "amsgrad": True}, lambda h, w: running_mean(h, w, 0.9)),
    "nadam": (optim.NAdam, {"weight_decay": 0.3}, lambda h, w: running_mean(h, w, 0.9, weight_decay=0.3)),
    "radam": (optim.RAdam, {"weight_decay": 0.3, "decoupled_weight_decay": True}, lambda h, w: running_mean(h, w, 0.9)),
    "adamax": (optim.Adamax, {"betas": (0.7, 0.9)}, lambda h, w: running_mean(h, w, 0.7)),
    "rotated": (RotatedAdam, {"weight_decay": 0.3, "refresh_every": 4}, lambda h, w: running_mean(h, w, 0.9)),
    "muon": (optim.Muon, {"momentum": 0.8}, lambda h, w: running_mean(h, w, 0.8, corrected=False)),
    "rmsprop_centered": (optim.RMSprop, {"alpha": 0.9, "centered": True}, lambda h, w: running_mean(h, w, 0.9)),
    "rmsprop_momentum": (
        optim.RMSprop,
        {"alpha": 0.9, "momentum": 0.8, "eps": 1e-3},
        lambda h, _: normalized_mean(h, 0.8, 0.9, 1e-3),
    ),
    "rprop": (optim.Rprop, {}, lambda h, _: h[-1][0]),
}


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("name", MEANS)
def test_the_mean_of_the_gradients_so_far_stands_for_the_rest(name: str, maximize: bool) -> None:
    cls, options, mean = MEANS[name]
    if maximize:
        if "maximize" not in inspect.signature(cls).parameters:
            return
        options = {**options, "maximize": True}
    torch.manual_seed(3)
    weight = torch.nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    optimizer = cls([weight], lr=0.02, **options)  # type: ignore[call-arg]
    sign = -1 if maximize else 1
    history: History = []
    for update in range(1, 9):  # refreshed bases and a rectified RAdam on the way
        weight.grad = torch.randn(4, 3, dtype=torch.float64)
        history.append((sign * weight.grad, weight.detach().clone()))
        optimizer.step()
        value = torch.randn(4, 3, dtype=torch.float64)
        found = predict_weights(optimizer, 1, kind="in_progress", in_progress=[PartialGradient(value, 0.25)])
        rest = sign * mean(history, weight.detach())
        if name == "rprop":  # 0 where a sign has flipped and the weight pauses
            rest = rest * (optimizer.state[weight]["prev"] != 0)
        expected = really_stepped(optimizer, [value + 0.75 * rest])
        assert largest_difference(found, expected) <= tolerance(optimizer), update


# ---- clipping ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "sgd_momentum", "muon", "rmsprop"])
def test_the_estimate_is_clipped_by_its_own_norm(name: str) -> None:
    """The whole mini-batch: bit for bit the gradient that clip_grad_norm_ makes."""
    optimizer = BY_NAME[name].make()
    train(optimizer, 3)
    grads = gradients(optimizer, 3)
    got = predict_weights(optimizer, 1, kind="in_progress", in_progress=whole(grads), clip=ClipEstimate(0.5))
    held = [torch.nn.Parameter(g.clone()) for g in grads]
    for p, g in zip(held, grads, strict=True):
        p.grad = g.clone()
    torch.nn.utils.clip_grad_norm_(held, 0.5)
    clipped = [p.grad for p in held]
    assert largest_difference(got, really_stepped(optimizer, clipped)) <= tolerance(optimizer)
    assert largest_difference(got, really_stepped(optimizer, grads)) > 1e-6 or name == "muon"
    generous = ClipEstimate(1e9)
    assert same(
        predict_weights(optimizer, 1, kind="in_progress", in_progress=whole(grads), clip=generous),
        predict_weights(optimizer, 1, kind="in_progress", in_progress=whole(grads)),
    )


@pytest.mark.parametrize("name", ["adamw", "sgd_momentum", "muon", "rmsprop"])
def test_each_estimate_is_clipped_by_its_own_limit(name: str) -> None:
    """The whole mini-batch: the gradients that are multiplied, each by the quotient of its limit and its norm."""
    optimizer = BY_NAME[name].make()
    train(optimizer, 3)
    grads = gradients(optimizer, 3)
    norms = [float(g.norm()) for g in grads]
    limits = torch.tensor([norm * (0.25 if n % 2 else 3.0) for n, norm in enumerate(norms)], dtype=torch.float64)
    clip = ClipEstimate(max_norms=limits)
    got = predict_weights(optimizer, 1, kind="in_progress", in_progress=whole(grads), clip=clip)
    clipped = [g * (0.25 if n % 2 else 1.0) for n, g in enumerate(grads)]
    assert largest_difference(got, really_stepped(optimizer, clipped)) <= tolerance(optimizer)
    with pytest.raises(ConfigError, match="1 max_norms for"):
        predict_weights(optimizer, 1, kind="in_progress", in_progress=whole(grads), clip=ClipEstimate(max_norms=limits[:1]))
    with pytest.raises(ConfigError, match="max_norms is 1.0, must be a tensor"):
        ClipEstimate(max_norms=1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("clip", [ClipEstimate(max_norm=0.5), ClipEstimate(last_factor=0.25), ClipEstimate(last_factor=0.0)])
def test_part_of_a_mini_batch_is_clipped_as_stated(clip: ClipEstimate) -> None:
    """By the norm of value and momentum together; or only the value, as the momentum consists of clipped gradients."""
    optimizer = BY_NAME["sgd_momentum"].make()
    train(optimizer, 3)
    grads = gradients(optimizer, 3)
    got = predict_weights(optimizer, 1, kind="in_progress", in_progress=[PartialGradient(g, 0.5) for g in grads], clip=clip)
    buffers = [optimizer.state[w]["momentum_buffer"] for w in weights_of(optimizer)]
    before = 1.0 if clip.last_factor is None else clip.last_factor
    estimates = [before * g + 0.5 * 0.2 * b for g, b in zip(grads, buffers, strict=True)]
    norm = math.sqrt(sum(float(h.square().sum()) for h in estimates))
    after = 1.0 if clip.max_norm is None else clip.max_norm / (norm + 1e-6)
    assert largest_difference(got, really_stepped(optimizer, [after * h for h in estimates])) < 1e-13


# ---- parameters that move otherwise, or not at all -------------------------------------------------------------------------------


def test_combined_optimizers_and_groups_of_other_kinds() -> None:
    torch.manual_seed(0)
    matrix, vector, frozen, other = (
        torch.nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((4, 3), (5,), (2,), (3,))
    )
    optimizer = CombinedOptimizer(
        torch.optim.Muon([matrix], lr=0.02),
        torch.optim.AdamW([{"params": [vector, frozen]}, {"params": [other], "prediction": "none"}], lr=0.02),
    )
    train(optimizer, 3)
    frozen.requires_grad_(False)
    grads: list[Tensor | None] = list(gradients(optimizer, 9))
    grads[2] = None
    known = [PartialGradient(g, 1.0) for g in grads]
    got = predict_weights(optimizer, 1, kind="in_progress", in_progress=known)
    real = really_stepped(optimizer, grads)
    assert largest_difference(got[:3], real[:3]) <= tolerance(optimizer)
    assert torch.equal(got[3], other)
    assert torch.equal(got[2], frozen)


def test_a_parameter_that_the_whole_mini_batch_did_not_reach_stays() -> None:
    optimizer = BY_NAME["adamw"].make()
    train(optimizer, 3)
    got = predict_weights(optimizer, 1, kind="in_progress", in_progress=[PartialGradient(None, 1.0)] * 3)
    assert same(got, values_of(optimizer))
    part = predict_weights(optimizer, 1, kind="in_progress", in_progress=[PartialGradient(None, 0.5)] * 3)
    assert largest_difference(part, values_of(optimizer)) > 1e-4


def test_an_optimizer_without_a_rule_steps_on_a_copy() -> None:
    optimizer = Case("lion", Lion).make()
    train(optimizer, 3)
    calls = optimizer.calls  # type: ignore[attr-defined]
    grads = gradients(optimizer, 9)
    one, three = (predict_weights(optimizer, s, kind="in_progress", in_progress=whole(grads)) for s in (1, 3))
    now = values_of(optimizer)
    assert same(one, really_stepped(optimizer, grads))
    assert largest_difference(three, [w + 3 * (a - w) for w, a in zip(now, one, strict=True)]) < 1e-14
    assert optimizer.calls == calls  # type: ignore[attr-defined]


def test_one_that_cannot_is_predicted_by_its_last_displacement_and_says_so() -> None:
    class Stubborn(torch.optim.SGD):
        def step(self, closure: Any) -> Any:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.sub_(closure())

    optimizer = Case("", Stubborn, {"lr": 0.1}).make()
    with pytest.warns(UserWarning, match="last displacement is used instead"):
        predictor = Predictor(optimizer, kind="in_progress")
    assert predictor.needs_previous and not predictor.uses_in_progress
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        Predictor(optimizer, kind="in_progress")


def test_the_predictor_keeps_nothing_and_steps_by_the_kernel() -> None:
    optimizer = Case("", torch.optim.AdamW, {"lr": 0.01}).make(dtype=torch.float32)
    train(optimizer, 2)
    predictor = Predictor(optimizer, kind="in_progress")
    assert predictor.uses_in_progress
    assert not predictor.fuses and not predictor.needs_grad and not predictor.needs_previous
    out = [torch.empty_like(w) for w in values_of(optimizer)]
    assert not predictor.fused_step(out, 2) and predictor.fused_step_over_gradients(2) is None
    grads = gradients(optimizer, 5)
    for scale in (1.0, 0.5, 0.0):
        predictor.scales = (scale,)
        predictor.predict_into(out, 1, whole(grads))
        real = really_stepped(optimizer, grads)
        expected = [w + scale * (r - w) for w, r in zip(values_of(optimizer), real, strict=True)]
        assert largest_difference(out, expected) < 1e-6
    present = [w.grad for w in weights_of(optimizer)]
    real = really_stepped(optimizer, present)
    predictor.step()
    assert largest_difference(values_of(optimizer), real) < 1e-6


@pytest.mark.parametrize(
    "change",
    [{"lr": 0.03}, {"weight_decay": 0.5}, {"betas": (0.5, 0.9)}, {"eps": 1.0}, {"maximize": True}, {"lr": torch.tensor(0.03)}],
    ids=str,
)
def test_options_may_change_between_two_predictions_of_one_version(change: dict[str, Any]) -> None:
    """What a dry step keeps from one prediction to the next does not outlive what it was made for."""
    optimizer = Case("", torch.optim.AdamW, {"lr": 0.01}).make(dtype=torch.float32)
    train(optimizer, 2)
    predictor, grads = Predictor(optimizer, kind="in_progress"), gradients(optimizer, 5)
    out = [torch.empty_like(w) for w in values_of(optimizer)]
    predictor.predict_into(out, 1, whole(grads))
    for group in optimizer.param_groups:
        group.update(change)
    for _ in range(2):
        predictor.predict_into(out, 1, whole(grads))
        assert largest_difference(out, really_stepped(optimizer, grads)) < 1e-6
    if isinstance(change.get("lr"), Tensor):
        change["lr"].fill_(0.09)  # in place: the same object, another number
        predictor.predict_into(out, 1, whole(grads))
        assert largest_difference(out, really_stepped(optimizer, grads)) < 1e-6


@pytest.mark.parametrize("updates", [0, 3])  # by the optimizer's own step on copies, and by its rule
def test_a_buffer_may_have_another_type(updates: int) -> None:
    optimizer = Case("", torch.optim.AdamW, {"lr": 0.01}).make(dtype=torch.float32)
    train(optimizer, updates)
    predictor = Predictor(optimizer, kind="in_progress")
    known = [PartialGradient(g, 0.5) for g in gradients(optimizer, 5)]
    low = [torch.empty_like(w, dtype=torch.bfloat16) for w in values_of(optimizer)]
    full = [torch.empty_like(w) for w in values_of(optimizer)]
    for steps in (1, 3):
        predictor.predict_into(low, steps, known)
        predictor.predict_into(full, steps, known)
        for a, b in zip(low, full, strict=True):
            torch.testing.assert_close(a, b.bfloat16(), rtol=2**-8, atol=0)


def test_what_cannot_be_used_is_refused() -> None:
    optimizer = BY_NAME["adamw"].make()
    grads = gradients(optimizer, 1)
    for bad, message in [
        ({"kind": "refined", "in_progress": whole(grads)}, "enters only predictions"),
        ({"kind": "refined", "clip": ClipEstimate(1.0)}, "enters only predictions"),
        ({"kind": "in_progress", "in_progress": whole(grads)[:1]}, "1 gradients in progress for 3"),
        ({"kind": "in_progress", "in_progress": [PartialGradient(grads[0], 1.5), None, None]}, "no share"),
        ({"kind": "in_progress", "in_progress": whole(grads[::-1])}, "not that of a parameter"),
    ]:
        with pytest.raises(ConfigError, match=message):
            predict_weights(optimizer, 1, **bad)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="not by several"):
        ClipEstimate(1.0, 0.5)
