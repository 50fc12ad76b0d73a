"""Asynchronous Nesterov (Ajanthan et al., ICML 2025): a long look-ahead in the optimizer absorbs the delay.

``d = g (W_t - W_{t-1})``, ``W_{t+1} = W_t + d - lr (1 - g) grad(W_{t-s} + d_{t-s})``: the gradient is discounted by 1 - g. In
practice NAdam with beta1 = g = 0.99 does that, on top of weight stashing. There is no separate prediction: forwards run on the
plain weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from pipeoptim.methods.catalog.pipemare import annealed
from pipeoptim.methods.method import Method, OwnOptimizer
from pipeoptim.weights.sources import Latest, Stashed


def constant_momentum(k: int, depth: int) -> Mapping[str, Any]:
    """NAdam's options, the same on every stage."""
    return {"betas": (0.99, 0.999), "momentum_decay": 0.004, "weight_decay": 0.01, "decoupled_weight_decay": True}


def rising_momentum(k: int, depth: int) -> Mapping[str, Any]:
    """NAdam's options without stashing: momentum rises with the delay, ``0.9 + (D-1-k) * 0.09 / D``.

    It goes by a stage's share of the longest delay, so that slack, which makes all delays longer, leaves it as it is.
    """
    return {**constant_momentum(k, depth), "betas": (0.9 + (depth - 1 - k) * 0.09 / depth, 0.999)}


def nesterov(stash: bool = True, anneal_updates: int = 0) -> Method:
    """Asynchronous Nesterov with its own settings.

    Args:
        stash: B on the weights of F; off, B on the latest, and momentum rises with the stage's delay.
        anneal_updates: updates until the learning rate is the user's on every stage, as PipeMare's K; 0 for that at once.

    Example:
        >>> nesterov(stash=False).name
        'nesterov+no_stash'
    """
    named = [("no_stash", not stash), ("T1", anneal_updates > 0)]
    return Method(
        name="+".join(["nesterov", *(name for name, on in named if on)]),
        order="async_1f1b",
        forward=Latest(),
        backward=Stashed() if stash else Latest(),
        optimizer=OwnOptimizer("NAdam", constant_momentum if stash else rising_momentum),
        lr_scale=partial(annealed, anneal_updates=anneal_updates) if anneal_updates else None,
        summary=(
            "stashing with NAdam, beta1 = 0.99; D-k copies"
            if stash
            else "no stashing, NAdam, its momentum rising with the delay; 1 copy"
        ),
        source="Ajanthan et al., Nesterov Method for Asynchronous Pipeline Parallel Optimization, ICML 2025 (arXiv 2505.01099)",
        deviations=_STASHING if stash else _NO_STASHING,
    )


_STASHING = (
    "The method is the optimizer: with another optimizer than its own it is PipeDream. Options as in the authors' public "
    "code: decoupled weight decay 0.01, momentum decay 0.004."
)
_NO_STASHING = (
    "The paper's variant without weight stashing; its momentum is that of the authors' public code. They also lower the learning "
    "rate of early stages at first, by PipeMare's rule over 7,000 updates: here that is the option anneal_updates, 0 by default "
    "because it must fit the length of the run."
)

METHOD = nesterov()

VARIANTS = (nesterov(stash=False),)

FACTORY = nesterov
