"""Several optimizers as one: Muon for the matrices of a stage and AdamW for the rest, say."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from pipeoptim.errors import ConfigError

CHEAPEST = "cheapest"
"""As the kind of a param group: the last displacement, which costs least, unless the run predicts from the mini-batch in progress."""


class CombinedOptimizer(Optimizer):
    """Steps several optimizers over different parameters as if they were one; each is predicted by its own rule.

    Usable wherever one optimizer is: in `po.Emulator`, `po.Schedule`, `po.predict_weights` and learning-rate
    schedulers, which see the param groups of all members (the same dictionaries, so a change of ``group["lr"]``
    reaches the member).

    Args:
        optimizers: at least one, no parameter in two of them.

    Raises:
        ConfigError: no optimizers, something that is none, a shared parameter, or one that needs a closure.

    Example:
        >>> import torch
        >>> w, b = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
        >>> both = CombinedOptimizer(torch.optim.Muon([w], lr=0.1), torch.optim.AdamW([b], lr=0.01))
        >>> [group["lr"] for group in both.param_groups]
        [0.1, 0.01]
        >>> w.grad, b.grad = torch.ones(2, 2), torch.ones(2)
        >>> both.step()
        >>> len(both.state_dict()["optimizers"])
        2
    """

    def __init__(self, *optimizers: Optimizer) -> None:
        if not optimizers:
            raise ConfigError("no optimizers to combine: pass at least one")
        for optimizer in optimizers:
            if not hasattr(optimizer, "param_groups") or not hasattr(optimizer, "step"):
                raise ConfigError(f"{optimizer!r} cannot be combined, must be a torch.optim.Optimizer")
        flat = [member for optimizer in optimizers for member in members(optimizer)]
        weights = [weight for member in flat for group in member.param_groups for weight in group["params"]]
        if len({id(weight) for weight in weights}) < len(weights):
            raise ConfigError("a parameter is in two of the combined optimizers: give each parameter to one of them")
        if any(isinstance(member, torch.optim.LBFGS) for member in flat):
            raise ConfigError("LBFGS calls the loss again inside its step and cannot be combined: use another optimizer")
        self.optimizers = tuple(flat)
        super().__init__([{"params": []}], {})  # torch insists on a group; the property below hides it

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of all members, in their order."""
        return [group for member in self.optimizers for group in member.param_groups]

    @param_groups.setter
    def param_groups(self, value: Any) -> None:
        """Ignored: torch's constructor assigns an empty list."""

    @property  # type: ignore[override]
    def state(self) -> Mapping[Tensor, Any]:
        """That of all members, for reading."""
        return {weight: state for member in self.optimizers for weight, state in member.state.items()}

    @state.setter
    def state(self, value: Any) -> None:
        """Ignored: torch's constructor assigns an empty one."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: it is unknown to which member the group belongs."""
        if param_group["params"]:
            raise ConfigError("a combined optimizer cannot take a group: add it to the member that it belongs to")

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Step every member. A closure is called once, before."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for member in self.optimizers:
            member.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop (or zero) the gradients of all members."""
        for member in self.optimizers:
            member.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """``{"optimizers": [state of each member]}``: tensors and plain data, as the members' own are."""
        return {"optimizers": [member.state_dict() for member in self.optimizers]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over `state_dict` of the same members in the same order."""
        states = state_dict.get("optimizers")
        if states is None or len(states) != len(self.optimizers):
            raise ConfigError(
                f"this is not the state of {len(self.optimizers)} combined optimizers: load it into the same combination"
            )
        for member, state in zip(self.optimizers, states, strict=True):
            member.load_state_dict(state)

    def __getstate__(self) -> dict[str, Any]:
        """For copies: torch's own implementation drops unknown attributes."""
        return {"defaults": self.defaults, "optimizers": self.optimizers}

    def __repr__(self) -> str:
        return f"CombinedOptimizer({', '.join(map(repr, self.optimizers))})"


def members(optimizer: Optimizer) -> tuple[Optimizer, ...]:
    """The optimizers that `optimizer` consists of: itself, if it is not combined."""
    return optimizer.optimizers if isinstance(optimizer, CombinedOptimizer) else (optimizer,)


def _checked_parameters(given: Any) -> list[Parameter]:
    found = list(given) if isinstance(given, Iterable) and not isinstance(given, Tensor) else [given]
    if any(isinstance(one, dict) for one in found):
        raise ConfigError("muon_adamw makes the groups itself: pass it parameters, and no groups")
    for one in found:
        if not isinstance(one, Tensor):
            raise ConfigError(f"muon_adamw was given {one!r}, must be given parameters: module.parameters()")
    return found


def _check_numbers(below: float = math.inf, **values: Any) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < below:
            limit = "finite" if below == math.inf else f"below {below:g}"
            raise ConfigError(f"{name} of muon_adamw is {value!r}, must be a number of at least 0, and {limit}")


def muon_adamw(
    parameters: Iterable[Parameter],
    lr: float = 1e-3,
    *,
    muon_lr: float | None = None,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
    momentum: float = 0.95,
    prediction: str | None = CHEAPEST,
) -> Optimizer:
    """Muon for the matrices and AdamW for everything else (biases, norms; use it on a stage's parameters).

    Args:
        parameters: of one stage.
        lr: of AdamW.
        muon_lr: of Muon, by default `lr` as well: its steps are scaled to the size of AdamW's.
        weight_decay: of both, decoupled.
        betas: of AdamW.
        momentum: of Muon.
        prediction: kind of prediction for the matrices; None for that of the run. "cheapest": in a run that predicts from the mini-batch
            in progress, so are they; in others by their last displacement, since Muon's rule repeats its matrix products, which cost as
            much as the step, while the displacement is the same at a constant learning rate, and nearly free.

    Raises:
        ConfigError: no parameters, groups of them, or a number out of range.

    Example:
        >>> import torch
        >>> muon_adamw(torch.nn.Linear(3, 2).parameters()).param_groups[0]["params"][0].shape
        torch.Size([2, 3])
    """
    weights = _checked_parameters(parameters)
    rate = lr if muon_lr is None else muon_lr
    _check_numbers(lr=lr, muon_lr=rate, weight_decay=weight_decay, momentum=momentum)
    if not isinstance(betas, (list, tuple)) or len(betas) != 2:
        raise ConfigError(f"betas of muon_adamw is {betas!r}, must be two numbers, for example (0.9, 0.999)")
    _check_numbers(1.0, beta1=betas[0], beta2=betas[1])
    matrices = [weight for weight in weights if weight.ndim == 2]
    rest = [weight for weight in weights if weight.ndim != 2]
    made: list[Optimizer] = []
    if matrices:
        group: dict[str, Any] = {"params": matrices} | ({} if prediction is None else {"prediction": prediction})
        made.append(
            torch.optim.Muon([group], lr=rate, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn="match_rms_adamw")
        )
    if rest:
        made.append(torch.optim.AdamW(rest, lr=lr, weight_decay=weight_decay, betas=betas))
    return CombinedOptimizer(*made)
