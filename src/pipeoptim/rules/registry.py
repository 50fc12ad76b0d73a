"""Which rule belongs to which optimizer. A new family is one new file with one `@register_rule`."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from torch import Tensor
from torch.optim import Optimizer

from pipeoptim.errors import ConfigError
from pipeoptim.optim import DelayCompensation
from pipeoptim.rules.combined import CombinedOptimizer
from pipeoptim.rules.fused.steppers import Stepper
from pipeoptim.rules.move import Ahead, Group, Momentum, Move, State


@dataclass(frozen=True)
class PredictionKind:
    """A kind of prediction.

    Attributes:
        formula: what it computes.
        exact: where it equals what the optimizer will do; each rule says more (`Rule.exact`).
        lr_order, steps_order: powers of lr and of s with which its error grows elsewhere, for gradients that change smoothly
            with the weights, at a constant learning rate and without decoupled weight decay. With independent noise in the
            gradients every kind is of order 1 in lr.
        asks_rule: whether a rule is asked for the move; the other kinds know nothing of the optimizer.
        in_progress: whether it is made from the gradient of the mini-batch in progress, and anew as that grows.
    """

    formula: str
    exact: str
    lr_order: int
    steps_order: int
    asks_rule: bool = True
    in_progress: bool = False


KINDS: dict[str, PredictionKind] = {
    "refined": PredictionKind(
        "W_t - (sum of the next s learning rates) * dW_t, with weight decay and every flag of the optimizer",
        "a constant direction: a constant gradient, once the moments have converged; any schedule that the scheduler knows",
        2,
        2,
    ),
    "paper": PredictionKind(
        "W_t - lr * s * dW_t exactly as in arXiv 2312.00839: no decoupled weight decay, no amsgrad, no schedule",
        "a constant direction and learning rate, without decoupled decay; with a schedule or decoupled decay of order 1 in lr",
        2,
        2,
    ),
    "decayed": PredictionKind(
        "the next s updates if all further gradients were zero: momentum decays",
        "gradients that are zero from now on; otherwise it falls short by their contribution",
        1,
        1,
    ),
    "in_progress": PredictionKind(
        "one step of the optimizer, not carried out, on g = (gradients of the mini-batch in progress so far) + (1 - their share) * m_hat; "
        "the other s-1 steps along its direction",
        "all micro-batches of the mini-batch seen: the update itself; otherwise micro-batches to come that equal the momentum",
        2,
        2,
        in_progress=True,
    ),
    "displacement": PredictionKind(
        "W_t + s * (W_t - W_{t-1}), for any optimizer",
        "a constant displacement",
        2,
        2,
        asks_rule=False,
    ),
    "none": PredictionKind("W_t: the latest weights, no prediction", "constant weights", 1, 1, asks_rule=False),
}
"""The kinds of prediction. A param group may choose its own: ``group["prediction"] = "paper"``."""

RULE_KINDS = tuple(name for name, kind in KINDS.items() if kind.asks_rule)
"""Kinds for which a rule is asked."""


class Rule(ABC):
    """How one optimizer family moves a weight, from its state after the last update.

    Subclasses state `exact` (in which situation the prediction equals what the optimizer really does) and
    `source` (where the formula comes from), and may name in `no_decayed` why they do not offer the kind
    "decayed".
    """

    exact: ClassVar[str] = ""
    source: ClassVar[str] = ""
    no_decayed: ClassVar[str] = ""
    elementwise: ClassVar[bool] = True
    """Whether an element of a weight moves by its own state and gradient only, so that parts of a weight can be predicted."""
    stepper: ClassVar[Stepper | None] = None
    """The optimizer's own step for a kernel that predicts in the same pass; None: torch's step, then a prediction."""

    @property
    def steps_dry(self) -> bool:
        """Whether the rule has a `dry_step`; without one the optimizer's own step runs on copies of weight and state."""
        return type(self).dry_step is not Rule.dry_step

    @property
    def keeps_momentum(self) -> bool:
        """Whether a `momentum` stands for micro-batches to come, in some setting of the optimizer at least."""
        return type(self).momentum is not Rule.momentum

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of prediction that this rule offers."""
        return tuple(kind for kind in KINDS if kind != "decayed" or not self.no_decayed)

    def needs_grad(self, group: Group, kind: str) -> bool:
        """Whether the last gradient, which no state holds, enters the prediction of this param group."""
        return False

    @abstractmethod
    def move(self, weight: Tensor, state: State, grad: Tensor | None, group: Group, ahead: Ahead) -> Move | None:
        """Where `weight` goes in ``ahead.steps`` updates; None if it stays (no update yet, or nothing known).

        Pure: reads its arguments and changes none of them. All tensors are real (complex ones come as views).
        """

    def momentum(self, weight: Tensor, state: State, group: Group) -> Momentum | None:
        """The running mean ``m_hat`` of past gradients, corrected for its start; None where the state holds none (yet)."""
        return None

    def dry_step(self, weight: Tensor, state: State, grad: Tensor, group: Group, ahead: Ahead) -> Move | None:
        """Where the next update takes `weight` if its gradient is `grad`, and the ``ahead.steps - 1`` further ones along its direction.

        Pure, as `move` is. None where the state does not tell (before the first update): then the optimizer's own step is
        carried out on copies.
        """
        return None


RULES: dict[type[Any], Rule] = {}
"""Optimizer class -> rule."""

REFUSED: dict[type[Any], str] = {}
"""Optimizer class -> why no prediction can be made for it."""

_RuleType = TypeVar("_RuleType", bound=type[Rule])


def register_rule(*optimizers: type[Any]) -> Callable[[_RuleType], _RuleType]:
    """Class decorator: use this `Rule` for these optimizer classes (and for subclasses that keep their `step`).

    Raises ConfigError for what is no class of optimizers, and if the rule does not state when it is exact and where it comes from.

    Example:
        >>> import torch, pipeoptim.rules as rules
        >>> class SignSGD(torch.optim.Optimizer):
        ...     pass
        >>> @rules.register_rule(SignSGD)
        ... class SignRule(rules.Rule):
        ...     exact = "constant gradient"
        ...     source = "Bernstein et al., arXiv 1802.04434"
        ...     def needs_grad(self, group, kind):
        ...         return True
        ...     def move(self, weight, state, grad, group, ahead):
        ...         return None if grad is None else rules.Move((rules.Term(ahead.lr_sum, grad.sign()),))
        >>> del rules.RULES[SignSGD]
    """

    for optimizer in optimizers:
        if not isinstance(optimizer, type):
            raise ConfigError(
                f"register_rule() was given {optimizer!r}, must be given classes of optimizers: register_rule(MyOptimizer)"
            )

    def register(rule: _RuleType) -> _RuleType:
        if not rule.exact or not rule.source:
            raise ConfigError(
                f"{rule.__name__} does not say when it is exact and where it comes from: set `exact` and `source`"
            )
        instance = rule()
        for optimizer in optimizers:
            RULES[optimizer] = instance
        return rule

    return register


def refuse(optimizer: type[Any], reason: str) -> None:
    """Note that no prediction can be made for this optimizer class, and why."""
    REFUSED[optimizer] = reason


def find_rule(optimizer: Optimizer) -> Rule | None:
    """The rule of this optimizer, or None where only its last displacement can be used.

    Looks up the class, then its bases, but no further than the first class that brings its own `step`: a
    subclass that updates differently must not be predicted as its base. Raises ConfigError for a refused
    optimizer.
    """
    cls = type(optimizer)
    if not hasattr(optimizer, "param_groups") or not hasattr(cls, "step"):
        raise ConfigError(f"{cls.__name__} is not an optimizer: pass a torch.optim.Optimizer (it needs param_groups and step)")
    if isinstance(optimizer, CombinedOptimizer):
        raise ConfigError(f"{cls.__name__} consists of several optimizers: ask for the rule of each of its `optimizers`")
    if isinstance(optimizer, DelayCompensation) and optimizer.follows_rule:
        return find_rule(optimizer.optimizer)
    for base in cls.__mro__:  # most derived first: a rule for a subclass wins
        if base not in RULES and base not in REFUSED:
            continue
        if not _updates_like(cls, base):
            return None
        if base in REFUSED:
            raise ConfigError(f"{cls.__name__} cannot be predicted: {REFUSED[base]}")
        return RULES[base]
    return None


def _updates_like(cls: type[Any], base: type[Any]) -> bool:
    """Whether `cls` inherits both the update and the layout of the state from `base`."""
    return all(_undecorated(cls, name) is _undecorated(base, name) for name in ("step", "_init_group"))


def _undecorated(cls: type[Any], name: str) -> Any:
    """A method without decorators: torch wraps `step` anew for each subclass, so identity needs the bottom one."""
    method = getattr(cls, name, None)
    return inspect.unwrap(method) if method is not None else None
