"""`pipeoptim.testing.check_rule`: every rule of the library passes, and a rule that breaks a promise is caught with its name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

from pipeoptim.errors import ConfigError
from pipeoptim.rules import RULES, Move, Rule, Term, predict_weights, register_rule
from pipeoptim.testing import check_rule
from rules_cases import CASES, Case, Lion, half_seen, set_random_grads, values_of, weights_of

TORCH = [cls for cls in RULES if cls.__module__.startswith("torch.optim")]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_rule_passes(case: Case) -> None:
    def make(parameters: Any) -> Optimizer:
        return case.cls(parameters, **case.settings)

    stated = {"repeats": case.repeats, "exact": case.exact, "updates": 4, "shapes": case.shapes, "tolerance": 1e-9}
    report = check_rule(case.cls, make=make, **stated)
    assert report.has_rule
    assert report.optimizer == case.cls.__name__
    assert set(report.kinds) >= {"refined", "paper"}


def test_an_optimizer_without_a_rule_passes_by_its_last_displacement() -> None:
    report = check_rule(Lion)
    assert (report.has_rule, report.kinds) == (False, ("displacement",))


def test_a_refused_optimizer_is_named() -> None:
    with pytest.raises(AssertionError, match="LBFGS cannot be predicted"):
        check_rule(torch.optim.LBFGS)


class SignSGD(Optimizer):
    """``W = W - lr sign(g)``, with a count."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["count"] = self.state[p].get("count", 0) + 1
                p.sub_(p.grad.sign(), alpha=group["lr"])


class Good(Rule):
    exact = "A gradient whose signs stay."
    source = "Bernstein et al., arXiv 1802.04434"
    no_decayed = "there is no momentum"

    def needs_grad(self, group: Any, kind: str) -> bool:
        return True

    def move(self, weight: Any, state: Any, grad: Any, group: Any, ahead: Any) -> Move | None:
        return Move((Term(ahead.lr_sum, grad.sign()),)) if grad is not None and "count" in state else None


class Impure(Good):
    def move(self, weight: Any, state: Any, grad: Any, group: Any, ahead: Any) -> Move | None:
        if grad is not None and "count" in state:
            grad.mul_(0.5)
        return super().move(weight, state, grad, group, ahead)


class Random(Good):
    def move(self, weight: Any, state: Any, grad: Any, group: Any, ahead: Any) -> Move | None:
        found = super().move(weight, state, grad, group, ahead)
        return None if found is None else Move((*found.terms, Term(1e-3, torch.rand_like(weight))))


class Hasty(Good):
    def move(self, weight: Any, state: Any, grad: Any, group: Any, ahead: Any) -> Move | None:
        return Move((Term(ahead.lr_sum, torch.ones_like(weight)),))


class Deaf(Good):
    """Takes no notice of the group's learning rate."""

    def move(self, weight: Any, state: Any, grad: Any, group: Any, ahead: Any) -> Move | None:
        return Move((Term(0.1 * ahead.steps, grad.sign()),)) if "count" in state else None


class Wrong(Good):
    def move(self, weight: Any, state: Any, grad: Any, group: Any, ahead: Any) -> Move | None:
        return Move((Term(2 * ahead.lr_sum, grad.sign()),)) if "count" in state else None


@pytest.fixture
def registered() -> Iterator[Any]:
    yield lambda rule: register_rule(SignSGD)(rule)
    RULES.pop(SignSGD, None)


def test_a_rule_of_ones_own_passes(registered: Any) -> None:
    registered(Good)
    report = check_rule(SignSGD, exact=4)
    assert report.has_rule
    assert report.one_step["refined"] < 1e-12


@pytest.mark.parametrize(
    ("rule", "words", "options"),
    [
        (Impure, "predicting changed weights, gradients or state", {}),
        (Random, "predicting changed weights, gradients or state|two results", {}),
        (Hasty, "moves weights before any update", {}),
        (Deaf, "differs from the last displacement by 0.05", {}),
        (Deaf, "off the real weights after 1 steps", {"repeats": False, "exact": 1}),
        (Wrong, "differs from the last displacement", {}),
        (Wrong, "off the real weights after 1 steps", {"repeats": False, "exact": 2}),
    ],
)
def test_a_broken_promise_is_told(registered: Any, rule: type[Rule], words: str, options: dict[str, Any]) -> None:
    registered(rule)
    with pytest.raises(AssertionError, match=words):
        check_rule(SignSGD, **options)


def test_a_rule_that_states_nothing_is_refused(registered: Any) -> None:
    class Silent(Good):
        exact = ""

    with pytest.raises(ConfigError, match="does not say when it is exact"):
        registered(Silent)


# ---- after step(), and right after load_state_dict ---------------------------------------------------------------------------


@pytest.mark.parametrize("cls", TORCH, ids=lambda cls: cls.__name__)
def test_predicts_after_a_step_and_right_after_loading_a_state(cls: type[Optimizer]) -> None:
    """A loaded optimizer predicts what the saved one did, bit for bit, given the same gradients; without them, as it did too."""
    cases = [c for c in CASES if c.cls is cls]
    case = next((c for c in cases if "momentum" in c.settings), cases[0])
    optimizer = case.make(dtype=torch.float32)  # the type of all state: loading casts NAdam's product to that of the weights
    for seed in range(3):
        set_random_grads(optimizer, seed)
        optimizer.step()
    for gone in (False, True):
        if gone:
            optimizer.zero_grad()
        fresh = case.make(seed=1, dtype=torch.float32)
        for own, saved in zip(weights_of(fresh), weights_of(optimizer), strict=True):
            own.data.copy_(saved)
            own.grad = None if saved.grad is None else saved.grad.clone()
        fresh.load_state_dict(optimizer.state_dict())
        kinds = [kind for kind in RULES[cls].kinds if kind not in ("displacement", "none")]
        for kind in kinds:
            expected, got = (predict_weights(one, 3, kind=kind, **half_seen(one, kind)) for one in (optimizer, fresh))
            assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True)), kind
            moved = [not torch.equal(a, b) for a, b in zip(got, values_of(fresh), strict=True)]
            assert gone or all(moved)


# ---- every option of every class ------------------------------------------------------------------------------------------------

IMPLEMENTATIONS = {"foreach", "fused", "capturable", "differentiable"}
"""How torch computes; `differentiable` is refused, `capturable` is tried in test_rules_capturable. The others have cases of their own."""

TRIED_ELSEWHERE = {
    (torch.optim.Muon, "ns_coefficients"),  # read by torch's own function
    (torch.optim.Muon, "ns_steps"),
    (torch.optim.Muon, "eps"),
}


@pytest.mark.parametrize("cls", TORCH, ids=lambda cls: cls.__name__)
def test_every_option_of_torch_is_tried(cls: type[Optimizer]) -> None:
    """A new option of a class fails here until a case has it."""
    import inspect

    from test_rules_properties import GROUPS

    options = set(list(inspect.signature(cls).parameters)[1:]) - IMPLEMENTATIONS
    options -= {name for known, name in TRIED_ELSEWHERE if known is cls}
    tried = {name for case in CASES if case.cls is cls for name in case.settings}
    tried |= {name for group in GROUPS[cls] for name in group}
    assert options <= tried
