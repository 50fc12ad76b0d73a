"""Adam in the eigenbasis of its gradients, where staleness costs it less than in the basis of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adam import adam

from pipeoptim.errors import ConfigError
from pipeoptim.optim.eigenbasis import first_basis, refreshed_basis, rotated, rotated_back

SIDES = ("bilateral", "unilateral")

_AVERAGES = {"row_basis": "row_average", "column_basis": "column_average"}
"""State of a rotated matrix: each basis, and the average of which it has the eigenvectors."""


class RotatedAdam(Optimizer):
    """Adam with decoupled weight decay, on matrices in a rotated basis: ``W -= lr U [m_hat / (sqrt(v_hat) + eps)] V^T``.

    With the gradient G of a matrix W (m x n), biases b1 and b2 of ``betas`` and t counting updates::

        L = b2 L + (1-b2) G G^T      R = b2 R + (1-b2) G^T G       U, V: their eigenvectors, refreshed every 10 updates
        M = b1 M + (1-b1) G          m = U^T M V                   the momentum is kept in the basis of W
        g = U^T G V                  v = b2 v + (1-b2) g^2         the second moment in the rotated one
        m_hat = m / (1 - b1^t)       v_hat = v / (1 - b2^t)        W = (1 - lr wd) W before the step

    All other parameters (vectors, convolutions, matrices with ``rotate=False`` or too large on both sides) move exactly as by
    ``torch.optim.AdamW``. In a pipeline the rotation makes the directions in which Adam scales its steps those of the curvature, so
    that a stale gradient misleads it less. More state than AdamW: ``2 (m^2 + n^2)`` numbers per matrix, or ``2 min(m, n)^2`` unilateral.

    Args:
        params: parameters, or groups of them, which may have options of their own. :func:`linear_weights` makes groups in which only
            the weights of linear layers are rotated, as in the paper.
        lr, betas, eps, weight_decay: as in AdamW.
        rotate: whether matrices are rotated.
        sides: "bilateral", or "unilateral": only the smaller side is rotated.
        refresh_every: updates from one refresh of the bases to the next.
        max_dim: a side larger than this is not rotated.
        foreach: for the parameters that are not rotated, as in AdamW.

    Raises:
        ConfigError: an option has an impossible value.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(4, 2)
        >>> optimizer = RotatedAdam(layer.parameters(), lr=1e-2)
        >>> layer(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[layer.weight])[:3]
        ['column_average', 'column_basis', 'exp_avg']

    Source: Adam in a rotated basis for asynchronous pipelines, arXiv 2602.03515 (ICML 2026); SOAP, arXiv 2409.11321, is its bilateral
    form. Deviation: eps is added to ``sqrt(v_hat)`` as in torch, not to ``sqrt(v)``.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        rotate: bool = True,
        sides: str = "bilateral",
        refresh_every: int = 10,
        max_dim: int = 4096,
        foreach: bool | None = None,
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "foreach": foreach}
        super().__init__(
            params, {**options, "rotate": rotate, "sides": sides, "refresh_every": refresh_every, "max_dim": max_dim}
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As every optimizer; also called for the groups of the constructor, so that all options are checked here."""
        _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update. A closure is called once, before."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.grad is not None]
            if any(p.grad.layout is not torch.strided for p in moving):
                raise ConfigError("RotatedAdam was given a sparse gradient; set sparse=False in the embedding")
            turned: list[Tensor] = []
            others: list[Tensor] = []
            for p in moving:
                (turned if any(rotated_sides(p, group)) else others).append(p)
            if others:
                self._step_plain(others, group)
            if turned:
                self._step_rotated(turned, group)
        return loss

    def _step_plain(self, params: list[Tensor], group: dict[str, Any]) -> None:
        states = [self._state_of(p, p.dtype) for p in params]
        adam(
            params,
            [_gradient(p) for p in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            foreach=group["foreach"],
            has_complex=any(p.is_complex() for p in params),
            decoupled_weight_decay=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _step_rotated(self, params: list[Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        lr = float(group["lr"])
        states = [self._state_of(p, _computing_dtype(p)) for p in params]
        gradients = [_gradient(p).to(_computing_dtype(p)) for p in params]
        for p, state, gradient in zip(params, states, gradients, strict=True):
            state["step"] += 1
            _turn_bases(state, gradient, rotated_sides(p, group), beta2, group["refresh_every"])
        steps = [float(state["step"]) for state in states]
        # Elementwise work for all matrices at once; the products in between are one kernel each in any case.
        first, second = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        turned = _turned(gradients, states)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, turned, turned, 1 - beta2)
        roots = torch._foreach_sqrt(second)
        torch._foreach_div_(roots, [math.sqrt(1 - beta2**t) for t in steps])
        torch._foreach_add_(roots, group["eps"])
        quotients = torch._foreach_div(_turned(first, states), roots)
        torch._foreach_mul_(quotients, [-lr / (1 - beta1**t) for t in steps])
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_add_(
            params, [rotated_back(q, *bases) for q, bases in zip(quotients, map(bases_of, states), strict=True)]
        )

    def _state_of(self, p: Tensor, dtype: torch.dtype) -> dict[str, Any]:
        state: dict[str, Any] = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over ``state_dict()`` bit for bit, of low-precision weights as well."""
        super().load_state_dict(state_dict)
        # torch rounds all state to the type of its parameter, but bases and averages of bfloat16 weights are float32.
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, p in zip(numbers, _parameters(self.param_groups), strict=True):
            saved = state_dict["state"].get(number, {})
            if any(name in saved for name in _AVERAGES):
                for name in saved.keys() - {"step"}:
                    self.state[p][name] = saved[name].to(device=p.device, dtype=_computing_dtype(p))


def bases_of(state: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """U and V of a matrix's state; None for a side that is not rotated."""
    return state.get("row_basis"), state.get("column_basis")


def rotated_sides(p: Tensor, group: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether rows and columns of a parameter are rotated.

    >>> group = {"rotate": True, "sides": "unilateral", "max_dim": 4096}
    >>> rotated_sides(torch.ones(3, 2), group), rotated_sides(torch.ones(3), group)
    ((False, True), (False, False))
    """
    if not group["rotate"] or p.ndim != 2 or p.is_complex() or not p.numel():
        return False, False
    rows, columns = (size <= group["max_dim"] for size in p.shape)
    if group["sides"] == "unilateral":
        smaller_rows = p.shape[0] <= p.shape[1]
        return rows and smaller_rows, columns and not smaller_rows
    return rows, columns


def _turn_bases(state: dict[str, Any], gradient: Tensor, sides: tuple[bool, bool], beta2: float, every: int) -> None:
    """Take the gradient into the averages; find the bases at the first update, and refresh them every so many."""
    for dim, (basis, average) in enumerate(_AVERAGES.items()):
        if not sides[dim]:
            continue
        product = gradient @ gradient.mT if dim == 0 else gradient.mT @ gradient
        if average not in state:
            state[average] = product.mul_(1 - beta2)
            state[basis] = first_basis(state[average])
            continue
        state[average].lerp_(product, 1 - beta2)
        if int(state["step"]) % every == 0:
            state[basis], order = refreshed_basis(state[average], state[basis])
            # Out of place: the second moment of a direction moves with its column.
            state["exp_avg_sq"] = state["exp_avg_sq"].index_select(dim, order)


def _turned(values: Sequence[Tensor], states: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    return [rotated(value, *bases_of(state)) for value, state in zip(values, states, strict=True)]


def _computing_dtype(p: Tensor) -> torch.dtype:
    """float32 for low-precision weights: neither QR nor an average of products works in bfloat16."""
    return torch.promote_types(p.dtype, torch.float32)


def _gradient(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad


def _parameters(groups: Sequence[Mapping[str, Any]]) -> Iterator[Tensor]:
    return (p for group in groups for p in group["params"])


def _check_options(group: Mapping[str, Any]) -> None:
    _check_number("lr", group["lr"])
    _check_number("eps", group["eps"])
    _check_number("weight_decay", group["weight_decay"])
    betas = group["betas"]
    if not isinstance(betas, (list, tuple)) or len(betas) != 2:
        raise ConfigError(f"betas of RotatedAdam is {betas!r}, must be two numbers, for example (0.9, 0.999)")
    for name, beta in zip(("beta1", "beta2"), betas, strict=True):
        _check_number(name, beta, below=1.0)
    for name in ("refresh_every", "max_dim"):
        if isinstance(group[name], bool) or not isinstance(group[name], int) or group[name] < 1:
            raise ConfigError(f"{name} of RotatedAdam is {group[name]!r}, must be an integer of at least 1")
    if not isinstance(group["rotate"], bool):
        raise ConfigError(f"rotate of RotatedAdam is {group['rotate']!r}, must be True or False")
    if group["foreach"] is not None and not isinstance(group["foreach"], bool):
        raise ConfigError(f"foreach of RotatedAdam is {group['foreach']!r}, must be True, False or None")
    if group["sides"] not in SIDES:
        raise ConfigError(f"sides of RotatedAdam is {group['sides']!r}, must be one of {', '.join(SIDES)}")


def _check_number(name: str, value: Any, below: float = math.inf) -> None:
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number < below:
        limit = "finite" if below == math.inf else f"below {below:g}"
        raise ConfigError(f"{name} of RotatedAdam is {value!r}, must be a number of at least 0, and {limit}")
