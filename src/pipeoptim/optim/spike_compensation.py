"""Spike compensation: a late gradient gets at once the share of its effect that momentum would have given it meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from pipeoptim.errors import ConfigError
from pipeoptim.optim.delay_compensation import DelayCompensation, moving

Group = dict[str, Any]


class SpikeCompensation(DelayCompensation):
    """SGD: ``W -= lr (m^s v + (1 - m^s)/(1 - m) g)`` in place of ``lr v``, after ``v = m v + g``; Adam: ``m_hat`` likewise.

    With momentum m, a gradient moves the weights by ``1 + m + m^2 + ...`` over the updates after it. One that comes s = ``gap`` updates
    late has missed s of them, which make up ``(1 - m^s)/(1 - m)``: it gets them at once, as a spike, and from then on decays as if it had
    been in time. At s = 1 this is Nesterov's momentum. Adam and AdamW, with b1 for m::

        W -= lr (b1^s m_hat + (1 - b1^s) g) / (sqrt(v_hat) + eps)

    Where a gradient is constant, nothing changes. It needs no memory but one gradient while it steps. The method
    ``spike_compensation`` uses it together with predicted weights, as its authors do.

    Args:
        optimizer: SGD (without dampening and Nesterov's form), Adam or AdamW (without amsgrad).
        gap: s, in updates; 0 leaves the optimizer as it is. "auto": a pipeline sets that of the stage, the mean over its micro-batches.

    Raises:
        ConfigError: another optimizer, or a gap that is no number of at least 0.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.zeros(1)); w.grad = torch.ones(1)
        >>> optimizer = SpikeCompensation(torch.optim.SGD([w], lr=1.0, momentum=0.5), gap=2)
        >>> optimizer.step()  # 0.5^2 v + (1 - 0.5^2)/(1 - 0.5) g, v = g = 1
        >>> w.item()
        -1.75

    Source: Kosson et al., Pipelined Backpropagation at Scale, MLSys 2021 (arXiv 2003.11666), for SGD; the form for Adam is this
    project's, from the same argument.
    """

    follows_rule = True  # a constant gradient is stepped as without the correction

    def __init__(self, optimizer: Optimizer, gap: float | str = "auto") -> None:
        super().__init__(optimizer, gap)
        _spike_of(optimizer)  # refuses those that there is no formula for
        for group in optimizer.param_groups:
            _check_group(optimizer, group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """To the wrapped optimizer, if there is a formula for its options."""
        _check_group(self.optimizer, {**self.optimizer.defaults, **param_group})
        super().add_param_group(param_group)

    def corrected_step(self, gap: float) -> None:
        """See the class."""
        if gap == 0:  # exactly the wrapped optimizer, at its speed
            self.optimizer.step()
            return
        pairs = [(p, group) for group in self.param_groups for p in moving(group)]
        # Before the step, which moves the weights that coupled decay is taken of.
        gradients = [_decayed_gradient(p, group) for p, group in pairs]
        self.optimizer.step()
        spike = _spike_of(self.optimizer)
        for (p, group), gradient in zip(pairs, gradients, strict=True):
            spike(p, gradient, self.state[p], group, gap)


def _sgd_spike(p: Tensor, gradient: Tensor, state: dict[str, Any], group: Group, gap: float) -> None:
    """From ``W - lr v`` to ``W - lr (a v + b g)``."""
    m, lr = float(group["momentum"]), float(group["lr"])
    if m == 0:  # nothing was missed: a gradient has all its effect at once
        return
    a, b = m**gap, (1 - m**gap) / (1 - m)
    p.add_(state["momentum_buffer"], alpha=lr * (1 - a)).sub_(gradient, alpha=lr * b)


def _adam_spike(p: Tensor, gradient: Tensor, state: dict[str, Any], group: Group, gap: float) -> None:
    """From numerator ``m_hat`` to ``a m_hat + (1 - a) g``."""
    (beta1, beta2), t, lr = map(float, group["betas"]), float(state["step"]), float(group["lr"])
    root = (state["exp_avg_sq"] / (1 - beta2**t)).sqrt_().add_(group["eps"])
    late = gradient - state["exp_avg"] / (1 - beta1**t)
    p.addcdiv_(late, root, value=-lr * (1 - beta1**gap))


def _decayed_gradient(p: Tensor, group: Group) -> Tensor:
    """The gradient that enters the momentum; not a copy where nothing is added to it."""
    assert p.grad is not None
    gradient = -p.grad if group["maximize"] else p.grad
    decay = 0.0 if group.get("decoupled_weight_decay", False) else float(group["weight_decay"])
    return gradient.add(p, alpha=decay) if decay else gradient


_Spike = Callable[[Tensor, Tensor, dict[str, Any], Group, float], None]

_SPIKES: dict[type[Optimizer], _Spike] = {SGD: _sgd_spike, Adam: _adam_spike, AdamW: _adam_spike}
"""By exact class: what a subclass steps by is not known."""


def _spike_of(optimizer: Optimizer) -> _Spike:
    if type(optimizer) not in _SPIKES:
        raise ConfigError(
            f"SpikeCompensation knows the momentum of SGD, Adam and AdamW, not that of {type(optimizer).__name__}; use one of them, or "
            "ErrorFeedback, which takes any optimizer"
        )
    return _SPIKES[type(optimizer)]


def _check_group(optimizer: Optimizer, group: Group) -> None:
    for option in ("dampening", "nesterov", "amsgrad", "differentiable"):
        if group.get(option, False):
            raise ConfigError(
                f"{option} of {type(optimizer).__name__} is {group[option]!r}, for which SpikeCompensation has no formula; leave it out"
            )
