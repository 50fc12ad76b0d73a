"""What every optimizer that corrects the steps of another one for the version gap has in common."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pipeoptim.errors import ConfigError


class DelayCompensation(Optimizer):
    """Base: steps ``optimizer`` and corrects what that did for gradients that are ``gap`` updates old.

    It has the parameter groups and the state of ``optimizer``, the same objects, so that schedulers, ``torch.amp.GradScaler``, checkpoints
    and code that sets ``group["lr"]`` work through it; a scheduler may belong to either of the two.

    Args:
        optimizer: the one that is stepped.
        gap: the version gap, in updates; it may be a fraction where the micro-batches of a mini-batch differ. "auto": a pipeline sets
            that of its stage.

    Attributes:
        paused: whether steps are not corrected for now; a pipeline sets it while it is synchronous.

    Raises:
        ConfigError: what cannot be wrapped, or a gap that is no number of at least 0.
    """

    follows_rule = False
    """Whether the next steps go where the rule of ``optimizer`` says, so that weights may be predicted by it."""

    def __init__(self, optimizer: Optimizer, gap: float | str = "auto") -> None:
        own = type(self).__name__
        if not isinstance(optimizer, Optimizer):
            raise ConfigError(f"{own} was given {optimizer!r}, must be given a torch.optim.Optimizer, whose steps it corrects")
        if isinstance(optimizer, DelayCompensation):
            raise ConfigError(
                f"{own} was given a {type(optimizer).__name__}, which corrects for the delay already; use one of the two (some "
                "methods bring their own)"
            )
        if hasattr(optimizer, "optimizers"):
            raise ConfigError(
                f"{own} was given a {type(optimizer).__name__}; wrap each of its optimizers and combine them afterwards"
            )
        self.optimizer = optimizer
        self.gap = gap if gap == "auto" else _checked_gap(own, gap)
        self.paused = False
        self._stage_gap: float | None = None
        super().__init__([{"params": []}], {})  # torch insists on a group; the property below hides it

    def set_stage_gap(self, gap: float) -> None:
        """Called by a pipeline: the gap of its stage, used where :attr:`gap` is "auto"."""
        self._stage_gap = gap

    @property
    def gap_in_force(self) -> float:
        """The number of updates that the next step corrects for."""
        return 0 if self.paused else self.known_gap

    @property
    def known_gap(self) -> float:
        """:attr:`gap`, or what a pipeline has set.

        Raises:
            ConfigError: it is "auto", and no pipeline has set it.
        """
        if not isinstance(self.gap, str):
            return self.gap
        if self._stage_gap is None:
            raise ConfigError(
                f"gap of {type(self).__name__} is 'auto', which a pipeline sets; without one pass a number of updates, for example gap=1"
            )
        return self._stage_gap

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One corrected update. A closure is called once, before."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.corrected_step(self.gap_in_force)
        return loss

    @abstractmethod
    def corrected_step(self, gap: float) -> None:
        """Step ``optimizer``, and correct the weights."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the wrapped optimizer."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: Any) -> None:
        """Ignored: torch's constructor assigns an empty list."""

    @property  # type: ignore[override]
    def state(self) -> Any:
        """That of the wrapped optimizer, to which a correction adds what it keeps of a parameter."""
        return self.optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        """Ignored: torch's constructor assigns an empty one."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """To the wrapped optimizer."""
        if param_group["params"]:  # torch's constructor adds an empty one
            self.optimizer.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """That of the wrapped optimizer."""
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """That of the wrapped optimizer, with what is kept for the correction in the state of each parameter."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over :meth:`state_dict`, or that of the wrapped optimizer alone."""
        self.optimizer.load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """For copies: torch's own implementation drops unknown attributes."""
        names = ("defaults", "optimizer", "gap", "paused", "_stage_gap")
        return {name: getattr(self, name) for name in names}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.optimizer!r}, gap={self.gap!r})"


def moving(group: dict[str, Any]) -> list[Tensor]:
    """The parameters of a group that the next step moves."""
    return [p for p in group["params"] if p.grad is not None]


def _checked_gap(own: str, gap: Any) -> float:
    if isinstance(gap, bool) or not isinstance(gap, int | float) or not 0 <= gap < math.inf:
        raise ConfigError(f"gap of {own} is {gap!r}, must be 'auto' or a number of updates of at least 0")
    return gap
