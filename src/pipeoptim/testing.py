"""A contract test for prediction rules, to run on a rule of one's own: `check_rule`."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from pipeoptim.rules import REFUSED, RULES, PartialGradient, find_rule, predict_weights, track
from pipeoptim.rules.fallback import copy_optimizer
from pipeoptim.rules.registry import RULE_KINDS
from pipeoptim.rules.scratch import unhooked_step

Make = Callable[[list[Parameter]], Optimizer]


@dataclass(frozen=True)
class RuleReport:
    """What `check_rule` found.

    Attributes:
        optimizer: name of the class.
        has_rule: False where the last displacement is used.
        kinds: the kinds of prediction that were checked.
        one_step: for each kind, the distance of the prediction for s = 1 from a real step with the last gradient, as a share of
            that step: 0 where it is exact.
    """

    optimizer: str
    has_rule: bool
    kinds: tuple[str, ...]
    one_step: dict[str, float] = field(default_factory=dict)


def check_rule(
    optimizer: type[Any],
    *,
    make: Make | None = None,
    repeats: bool = True,
    exact: int = 0,
    updates: int = 5,
    shapes: Sequence[tuple[int, ...]] = ((4, 3), (5,), (3, 6)),
    tolerance: float = 1e-9,
    seed: int = 0,
) -> RuleReport:
    """Check that an optimizer is predicted as the library promises; for the rule that you registered, or the fallback.

    Checked for every kind that is offered: it changes nothing (weights, gradients, state, random numbers); s = 0, and s > 0
    before the first update, give the weights bit for bit; shape, type and strides are kept; it is linear in the
    displacement where that is claimed; each param group is predicted with its own options; a dry step with the gradient of the next
    update is that update.

    Args:
        optimizer: the class.
        make: ``make(parameters)`` returns an instance; by default ``optimizer(parameters)``. Called several times.
        repeats: the kind "refined" equals the last displacement, ``W_t + s (W_t - W_{t-1})``, as it does for most optimizers at a
            constant learning rate without decoupled weight decay. Without a rule this always holds.
        exact: largest s for which "refined" equals s real steps under a gradient that was the same from the first update on.
        updates: how many are made before a prediction.
        shapes: of the parameters, in float64.
        tolerance: allowed absolute difference.
        seed: of weights and gradients.

    Raises:
        AssertionError: a promise is broken; the message says which.
        ConfigError: the optimizer is refused.

    Example:
        >>> import torch
        >>> check_rule(torch.optim.Adam, exact=3).has_rule
        True
    """
    assert optimizer not in REFUSED, f"{optimizer.__name__} cannot be predicted: {REFUSED[optimizer]}"
    case = _Case(optimizer, make or optimizer, [tuple(shape) for shape in shapes], seed, tolerance)
    rule = find_rule(case.fresh())
    kinds = tuple(k for k in rule.kinds if k in RULE_KINDS) if rule is not None else ("displacement",)
    if rule is not None:
        registered = next(RULES[base] for base in optimizer.__mro__ if base in RULES)
        assert registered.exact and registered.source, f"{type(registered).__name__} does not state `exact` and `source`"
    one_step = {}
    for kind in kinds:
        case.check_purity(kind, updates)
        case.check_identity(kind, updates)
        case.check_form(kind, updates)
        case.check_groups(kind, updates)
        one_step[kind] = case.one_step_error(kind, updates)
    for before in (0, updates):
        case.check_in_progress(before)
    if repeats:
        case.check_displacement(kinds[0], updates)
    if exact:
        case.check_exactness(kinds[0], updates, exact)
    return RuleReport(optimizer.__name__, rule is not None, kinds, one_step)


@dataclass(frozen=True)
class _Case:
    cls: type[Any]
    make: Make
    shapes: list[tuple[int, ...]]
    seed: int
    tolerance: float

    def fresh(self, offset: int = 0) -> Optimizer:
        generator = torch.Generator().manual_seed(self.seed + offset)
        return self.make([Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in self.shapes])

    def trained(self, updates: int, *, constant: bool = False, rate: float = 1.0) -> tuple[Optimizer, list[Tensor]]:
        """An optimizer after some updates (tracked), at `rate` times its learning rate, and the weights before the last of them."""
        optimizer = self.fresh()
        for group in optimizer.param_groups:
            if rate != 1.0 and "lr" in group:
                group["lr"] = rate * group["lr"]
        track(optimizer)
        before = _values(optimizer)
        for update in range(updates):
            self.give_gradients(optimizer, 0 if constant else update)
            before = _values(optimizer)
            optimizer.step()
        return optimizer, before

    def give_gradients(self, optimizer: Optimizer, number: int) -> None:
        generator = torch.Generator().manual_seed(self.seed + 1000 + number)
        for weight in _weights(optimizer):
            weight.grad = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)

    def name(self, kind: str) -> str:
        return f"{self.cls.__name__}, kind={kind!r}"

    def check_purity(self, kind: str, updates: int) -> None:
        optimizer, _ = self.trained(updates)
        before = _snapshot(optimizer)
        first = predict_weights(optimizer, 3, kind=kind)
        assert _same(before, _snapshot(optimizer)), f"{self.name(kind)}: predicting changed weights, gradients or state"
        second = predict_weights(optimizer, 3, kind=kind)
        assert _same(first, second), f"{self.name(kind)}: predicting twice gives two results"
        for tensor in first:
            tensor.fill_(float("nan"))
        assert _same(before, _snapshot(optimizer)), f"{self.name(kind)}: the prediction shares memory with weights or state"

    def check_identity(self, kind: str, updates: int) -> None:
        new = self.fresh()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nothing is known of an optimizer without a rule before its first step
            predicted = predict_weights(new, 3, kind=kind)
        assert _same(predicted, _values(new)), f"{self.name(kind)}: moves weights before any update"
        optimizer, _ = self.trained(updates)
        assert _same(predict_weights(optimizer, 0, kind=kind), _values(optimizer)), f"{self.name(kind)}: s = 0 moves weights"

    def check_form(self, kind: str, updates: int) -> None:
        optimizer, _ = self.trained(updates)
        for got, weight in zip(predict_weights(optimizer, 2, kind=kind), _weights(optimizer), strict=True):
            form = got.shape, got.dtype, got.device, got.stride(), got.requires_grad
            wanted = weight.shape, weight.dtype, weight.device, weight.stride(), False
            assert form == wanted, f"{self.name(kind)}: the prediction has form {form}, the weight {wanted}"

    def check_groups(self, kind: str, updates: int) -> None:
        """Two groups with different learning rates are predicted as two optimizers would be."""
        apart = [self.fresh(offset) for offset in (0, 1)]
        if any(len(optimizer.param_groups) != 1 or "lr" not in optimizer.param_groups[0] for optimizer in apart):
            return
        together = self.make([Parameter(w.detach().clone()) for w in _weights(apart[0])])
        together.add_param_group({"params": [Parameter(w.detach().clone()) for w in _weights(apart[1])]})
        apart[1].param_groups[0]["lr"] = together.param_groups[1]["lr"] = 0.5 * apart[1].param_groups[0]["lr"]
        for optimizer in (together, *apart):
            track(optimizer)
        for update in range(updates):
            for number, optimizer in enumerate(apart):
                self.give_gradients(optimizer, 10 * update + number)
            pairs = zip(_weights(together), [*_weights(apart[0]), *_weights(apart[1])], strict=True)
            for weight, twin in pairs:
                weight.grad = None if twin.grad is None else twin.grad.clone()
            for optimizer in (together, *apart):
                optimizer.step()
        expected = [w for optimizer in apart for w in predict_weights(optimizer, 2, kind=kind)]
        error = _distance(predict_weights(together, 2, kind=kind), expected)
        assert error <= self.tolerance, f"{self.name(kind)}: a second param group is {error:g} off what its options say"

    def check_displacement(self, kind: str, updates: int) -> None:
        for rate, steps in ((1.0, 1), (1.0, 3), (0.5, 1)):  # a rule that takes no notice of the learning rate shows at the last
            optimizer, before = self.trained(updates, rate=rate)
            expected = [w + steps * (w - old) for w, old in zip(_values(optimizer), before, strict=True)]
            error = _distance(predict_weights(optimizer, steps, kind=kind), expected)
            assert error <= self.tolerance, (
                f"{self.name(kind)}: differs from the last displacement by {error:g} at s = {steps}; pass repeats=False if the rule "
                "is meant to know better"
            )

    def check_exactness(self, kind: str, updates: int, exact: int) -> None:
        for rate in (1.0, 0.5):
            optimizer, _ = self.trained(updates, constant=True, rate=rate)
            for steps in range(1, exact + 1):
                error = _distance(predict_weights(optimizer, steps, kind=kind), _really_stepped(optimizer, steps))
                assert error <= self.tolerance, (
                    f"{self.name(kind)}: {error:g} off the real weights after {steps} steps under a constant gradient"
                )

    def check_in_progress(self, updates: int) -> None:
        """With the whole mini-batch seen, "in_progress" is the next step, whether by the rule or by the optimizer's step on copies."""
        optimizer, _ = self.trained(updates)
        self.give_gradients(optimizer, updates)
        before, real = _snapshot(optimizer), _really_stepped(optimizer, 1)
        for share in (1.0, 0.5):
            known = [PartialGradient(w.grad, share) for w in _weights(optimizer)]
            predicted = predict_weights(optimizer, 1, kind="in_progress", in_progress=known)
            assert _same(before, _snapshot(optimizer)), (
                f"{self.name('in_progress')}: a dry step changed weights, gradients or state"
            )
            error = _distance(predicted, real)
            assert share < 1 or error <= self.tolerance, (
                f"{self.name('in_progress')}: a dry step with the gradient of the next update is {error:g} off that update"
            )

    def one_step_error(self, kind: str, updates: int) -> float:
        optimizer, _ = self.trained(updates)
        real = _really_stepped(optimizer, 1)
        moved = _distance(real, _values(optimizer))
        return _distance(predict_weights(optimizer, 1, kind=kind), real) / moved if moved else 0.0


def _really_stepped(optimizer: Optimizer, steps: int) -> list[Tensor]:
    """The weights after stepping a copy with the present gradients."""
    twin, weights = copy_optimizer(optimizer)
    for _ in range(steps):
        unhooked_step(type(optimizer))(twin)
    return weights


def _weights(optimizer: Optimizer) -> list[Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def _values(optimizer: Optimizer) -> list[Tensor]:
    return [weight.detach().clone() for weight in _weights(optimizer)]


def _snapshot(optimizer: Optimizer) -> tuple[Any, ...]:
    grads = [None if w.grad is None else w.grad.clone() for w in _weights(optimizer)]
    return copy.deepcopy(optimizer.state_dict()), _values(optimizer), grads, torch.get_rng_state()


def _same(first: Any, second: Any) -> bool:
    """Bit for bit, through containers."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(_same(a, b) for a, b in zip(first, second, strict=True))
    return bool(first == second)


def _distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    pairs = zip(first, second, strict=True)
    return max((float((a.detach() - b.detach()).abs().max()) for a, b in pairs if a.numel()), default=0.0)


__all__ = ["RuleReport", "check_rule"]
