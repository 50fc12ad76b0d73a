"""Does a prediction equal what the optimizer really does, where its rule says so?"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pipeoptim.rules import REFUSED, RULES, predict_weights
from rules_cases import BY_NAME, CASES, Case, largest_difference, really_stepped, train, values_of, weights_of

TOLERANCE = 1e-10


def optimizer_classes() -> list[type[Any]]:
    return [v for v in vars(torch.optim).values() if isinstance(v, type) and v is not torch.optim.Optimizer]


@pytest.mark.parametrize("cls", optimizer_classes(), ids=lambda cls: cls.__name__)
def test_every_torch_optimizer_has_a_rule_or_a_stated_refusal(cls: type[Any]) -> None:
    assert (cls in RULES) != (cls in REFUSED), f"torch.optim.{cls.__name__} is new: write rules/{cls.__name__.lower()}.py"
    assert len(REFUSED.get(cls, "a rule")) > 5


@pytest.mark.parametrize("cls", RULES, ids=lambda cls: cls.__name__)
def test_every_rule_has_cases_and_says_when_it_is_exact_and_where_it_comes_from(cls: type[Any]) -> None:
    assert any(case.cls is cls for case in CASES)
    assert len(RULES[cls].exact) > 20
    assert len(RULES[cls].source) > 10


@pytest.mark.parametrize("case", [c for c in CASES if c.repeats], ids=lambda c: c.name)
@pytest.mark.parametrize("updates", [1, 2, 5, 9])
def test_equals_last_displacement_at_constant_learning_rate(case: Case, updates: int) -> None:
    optimizer = case.make()
    before = train(optimizer, updates)
    for steps in (1, 3):
        expected = [now + steps * (now - old) for now, old in zip(values_of(optimizer), before, strict=True)]
        assert largest_difference(predict_weights(optimizer, steps), expected) < TOLERANCE


@pytest.mark.parametrize("case", [c for c in CASES if c.exact], ids=lambda c: c.name)
def test_equals_real_steps_under_a_constant_gradient(case: Case) -> None:
    optimizer = case.make()
    train(optimizer, 4, constant=True)
    start = values_of(optimizer)
    for steps in range(1, case.exact + 1):
        real = really_stepped(optimizer, steps)
        assert largest_difference(real, start) > 1e-3 * steps  # it does move
        assert largest_difference(predict_weights(optimizer, steps), real) < TOLERANCE * 10


@pytest.mark.parametrize("name", ["sgd_momentum", "sgd_momentum_decay_dampening", "sgd_nesterov"])
@pytest.mark.parametrize("kind", ["refined", "paper"])
def test_momentum_at_its_fixed_point_is_exact(name: str, kind: str) -> None:
    optimizer = BY_NAME[name].make()
    group = optimizer.param_groups[0]
    group["weight_decay"] = 0.0
    train(optimizer, 1, constant=True)
    for weight in weights_of(optimizer):
        fixed = weight.grad * (1 - group["dampening"]) / (1 - group["momentum"])
        optimizer.state[weight]["momentum_buffer"].copy_(fixed)
    for steps in (1, 2, 5):
        assert largest_difference(predict_weights(optimizer, steps, kind=kind), really_stepped(optimizer, steps)) < TOLERANCE


@pytest.mark.parametrize(("name", "rate"), [("sgd_decay", 0.1 * 0.1), ("adamw", 0.01 * 0.1), ("asgd", 0.01 * 0.2)])
def test_decay_is_linear_with_the_stated_second_order_error(name: str, rate: float) -> None:
    optimizer = BY_NAME[name].make()
    train(optimizer, 4, constant=True)
    scale = max(float(w.detach().abs().max() + w.grad.abs().max()) for w in weights_of(optimizer))
    for steps in (2, 4, 8):
        error = largest_difference(predict_weights(optimizer, steps), really_stepped(optimizer, steps))
        bound = (rate * steps) ** 2 * (scale + 1 / 0.1)
        assert 0 < error < bound


@pytest.mark.parametrize(
    ("name", "tolerance"),
    # share of the real displacement; each is what the rule's text allows: a mean, a moment or a size still drifts
    [
        ("nadam", 0.05),
        ("adadelta", 0.15),
        ("adagrad", 0.15),
        ("rmsprop", 0.05),
        ("rmsprop_centered", 0.05),
        ("adafactor_decay", 0.02),
        ("radam_rectified", 0.10),
        ("muon", 0.06),  # Newton-Schulz runs in bfloat16
        ("muon_plain", 0.06),
    ],
)
def test_error_under_a_long_constant_gradient_is_small(name: str, tolerance: float) -> None:
    case = BY_NAME[name]
    if name == "rmsprop_centered":
        settings = {**case.settings, "alpha": 0.7, "eps": 0.1}  # the centered variance goes to 0: eps must carry the step
    elif name in ("adadelta", "rmsprop"):
        settings = {**case.settings, "alpha" if name == "rmsprop" else "rho": 0.9}
    else:
        settings = {**case.settings, **({"weight_decay": 0.0} if name == "radam_rectified" else {})}
    optimizer = Case(name, case.cls, settings).make()
    train(optimizer, 60, constant=True)
    start = values_of(optimizer)
    for steps in (1, 4):
        real = really_stepped(optimizer, steps)
        error = largest_difference(predict_weights(optimizer, steps), real)
        assert error <= tolerance * largest_difference(real, start)


def test_adagrad_lets_the_rate_fall_on() -> None:
    """With a large sum to start from, only the rate changes from update to update, and the prediction is all but exact."""
    settings = {"lr": 1e5, "lr_decay": 0.3, "initial_accumulator_value": 1e12}
    optimizer = Case("", torch.optim.Adagrad, settings).make()
    train(optimizer, 3, constant=True)
    start = values_of(optimizer)
    real = really_stepped(optimizer, 4)
    moved = largest_difference(real, start)
    assert moved > 0.1
    assert largest_difference(predict_weights(optimizer, 4), real) < 1e-9 * moved
    paper = predict_weights(optimizer, 4, kind="paper")  # keeps the rate of the last update
    expected = [w - 4 * 1e5 / (1 + 2 * 0.3) * p.grad / 1e6 for w, p in zip(start, weights_of(optimizer), strict=True)]
    assert largest_difference(paper, expected) < 1e-9 * moved


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_asgd_lets_eta_fall_on(gamma: float) -> None:
    """At W = 0 nothing decays, and what is left is the sum of the etas that the optimizer really uses next."""
    optimizer = Case("", torch.optim.ASGD, {"lr": 0.5, "lambd": 1.0}).make()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma)
    train(optimizer, 3)
    with torch.no_grad():
        for weight in weights_of(optimizer):
            weight.zero_()
    etas: list[float] = []

    def note_eta(twin: torch.optim.Optimizer, step: int) -> None:
        etas.append(twin.state[weights_of(twin)[0]]["eta"].item())
        twin.param_groups[0]["lr"] = 0.5 * gamma**step

    really_stepped(optimizer, 4, before_each=note_eta)
    assert etas[0] > 1.1 * etas[3]
    for got, weight in zip(predict_weights(optimizer, 4, scheduler=scheduler), weights_of(optimizer), strict=True):
        torch.testing.assert_close(got, -sum(etas) * weight.grad, rtol=1e-6, atol=0)  # torch keeps eta in float32


def test_rprop_pauses_after_a_flip_as_the_optimizer_does() -> None:
    weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = torch.optim.Rprop([weight], lr=0.1)
    for grads in ([1.0, 1.0, 0.0], [1.0, -1.0, 0.0]):
        weight.grad = torch.tensor(grads, dtype=torch.float64)
        optimizer.step()
    assert optimizer.state[weight]["prev"][1] == 0
    for steps in (1, 2, 5):
        assert largest_difference(predict_weights(optimizer, steps), really_stepped(optimizer, steps)) < TOLERANCE
    paper = predict_weights(optimizer, 2, kind="paper")[0]
    torch.testing.assert_close(paper, weight.detach() - 2 * torch.tensor([0.12, 0.0, 0.0], dtype=torch.float64))


# ---- the formulas of the paper, written out by hand ------------------------------------------------------------------------


def test_paper_formulas() -> None:
    steps = 3
    sgd = BY_NAME["sgd_decay"].make()
    train(sgd, 2)
    for got, w in zip(predict_weights(sgd, steps, kind="paper"), weights_of(sgd), strict=True):
        torch.testing.assert_close(got, w.detach() - 0.1 * steps * w.grad, rtol=0, atol=1e-14)
    sgdm = BY_NAME["sgd_nesterov_decay"].make()
    train(sgdm, 2)
    for got, w in zip(predict_weights(sgdm, steps, kind="paper"), weights_of(sgdm), strict=True):
        buffer = sgdm.state[w]["momentum_buffer"]
        torch.testing.assert_close(got, w.detach() - 0.1 * steps * buffer, rtol=0, atol=1e-14)
    for name in ("adam", "adam_amsgrad", "adamw"):
        adam = BY_NAME[name].make()
        train(adam, 5)
        group = adam.param_groups[0]
        (b1, b2), eps, lr = group["betas"], group["eps"], group["lr"]
        for got, w in zip(predict_weights(adam, steps, kind="paper"), weights_of(adam), strict=True):
            m, v = adam.state[w]["exp_avg"], adam.state[w]["exp_avg_sq"]
            direction = (m / (1 - b1**5)) / ((v / (1 - b2**5)).sqrt() + eps)
            torch.testing.assert_close(got, w.detach() - lr * steps * direction, rtol=0, atol=1e-12)


def test_refined_and_paper_differ_by_the_decay_term_alone_for_adamw() -> None:
    optimizer = BY_NAME["adamw"].make()
    train(optimizer, 5)
    refined, paper = predict_weights(optimizer, 4), predict_weights(optimizer, 4, kind="paper")
    for r, p, w in zip(refined, paper, weights_of(optimizer), strict=True):
        torch.testing.assert_close(p - r, 4 * 0.01 * 0.1 * w.detach(), rtol=0, atol=1e-14)


def test_amsgrad_counts_in_refined_only() -> None:
    optimizer = BY_NAME["adam_amsgrad"].make()
    train(optimizer, 6)
    assert largest_difference(predict_weights(optimizer, 2), predict_weights(optimizer, 2, kind="paper")) > 1e-4


# ---- zero gradients ahead -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dampening", [0.0, 0.3])
def test_decayed_momentum_equals_real_steps_with_zero_gradients(nesterov: bool, dampening: float) -> None:
    settings = {"lr": 0.1, "momentum": 0.8, "nesterov": nesterov, "dampening": 0.0 if nesterov else dampening}
    optimizer = Case("", torch.optim.SGD, settings).make()
    train(optimizer, 3)
    zeros = [torch.zeros_like(w) for w in weights_of(optimizer)]
    for steps in (1, 2, 5):
        real = really_stepped(optimizer, steps, grads=zeros)
        assert largest_difference(predict_weights(optimizer, steps, kind="decayed"), real) < TOLERANCE


@pytest.mark.parametrize(
    "name", ["adam", "adamw", "nadam", "nadam_decoupled", "radam", "radam_rectified", "adamax", "rotated_adam_decay"]
)
def test_decayed_moments_equal_real_steps_with_zero_gradients_and_a_held_second_moment(name: str) -> None:
    """With b2 next to 1, zero gradients leave v where it is, which is what the rule assumes. (Adamax: b2 = 1 - 1e-9.)"""
    case = BY_NAME[name]
    optimizer = case.make()
    coupled = not optimizer.param_groups[0].get("decoupled_weight_decay", False)
    if coupled:
        optimizer.param_groups[0]["weight_decay"] = 0.0  # rotated Adam's is decoupled always; without it as well
    train(optimizer, 8)
    zeros = [torch.zeros_like(w) for w in weights_of(optimizer)]
    start = values_of(optimizer)
    for steps in (1, 4):
        predicted = predict_weights(optimizer, steps, kind="decayed")

        def restore(twin: torch.optim.Optimizer, step: int) -> None:
            """Undo what the zero gradient of the step before did to v: the rule keeps it."""
            beta2 = twin.param_groups[0]["betas"][1]
            for w in weights_of(twin):
                key = "exp_inf" if "exp_inf" in twin.state[w] else "exp_avg_sq"
                twin.state[w][key].div_(beta2)

        real = really_stepped(optimizer, steps, grads=zeros, before_each=restore)
        moved = largest_difference(real, start)
        linear = 0.01 * 0.1 * steps * moved if name == "nadam_decoupled" else 0.0  # its decay skips the cross terms
        assert moved > 1e-4
        assert largest_difference(predicted, real) < TOLERANCE + linear


def test_decayed_adam_written_out() -> None:
    optimizer = BY_NAME["adamw"].make()
    train(optimizer, 5)
    expected = values_of(optimizer)
    for w, original in zip(expected, weights_of(optimizer), strict=True):
        m, v = optimizer.state[original]["exp_avg"], optimizer.state[original]["exp_avg_sq"]
        for i in (1, 2, 3):
            w *= 1 - 0.01 * 0.1
            t = 5 + i
            w -= 0.01 * 0.9**i * m / ((1 - 0.9**t) * ((v / (1 - 0.999**t)).sqrt() + 1e-8))
    assert largest_difference(predict_weights(optimizer, 3, kind="decayed"), expected) < 1e-13


def test_decayed_coefficient_is_the_sum_of_powers() -> None:
    optimizer = BY_NAME["sgd_momentum"].make()
    train(optimizer, 3)
    mu, steps = 0.8, 4
    coefficient = 0.1 * math.fsum(mu**i for i in range(1, steps + 1))
    for got, w in zip(predict_weights(optimizer, steps, kind="decayed"), weights_of(optimizer), strict=True):
        buffer = optimizer.state[w]["momentum_buffer"]
        torch.testing.assert_close(got, w.detach() - coefficient * buffer, rtol=0, atol=1e-14)


def test_muon_decayed_keeps_its_direction() -> None:
    """Orthogonalization ignores the size of the buffer, so zero gradients change nothing but rounding (bfloat16)."""
    optimizer = BY_NAME["muon_plain"].make()
    train(optimizer, 3)
    zeros = [torch.zeros_like(w) for w in weights_of(optimizer)]
    real = really_stepped(optimizer, 3, grads=zeros)
    moved = largest_difference(real, values_of(optimizer))
    assert largest_difference(predict_weights(optimizer, 3, kind="decayed"), real) < 0.03 * moved
