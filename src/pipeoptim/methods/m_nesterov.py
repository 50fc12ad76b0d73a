"""Asynchronous Nesterov (Ajanthan et al., ICML 2025): a long look-ahead in the optimizer absorbs the delay.

NAdam with beta1 = 0.99, whose look-ahead discounts the gradient by ``1 - beta1``, on top of weight stashing. There is no
separate prediction: forwards run on the plain weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeoptim.methods.method import Method, OwnOptimizer
from pipeoptim.weights.sources import Latest, Stashed


def constant_momentum(k: int, depth: int) -> Mapping[str, Any]:
    """NAdam's options, the same on every stage."""
    return {"betas": (0.99, 0.999), "momentum_decay": 0.004, "weight_decay": 0.01, "decoupled_weight_decay": True}


def rising_momentum(k: int, depth: int) -> Mapping[str, Any]:
    """NAdam's options without stashing: momentum rises with the delay, ``0.9 + (D-1-k) * 0.09 / D``."""
    return {**constant_momentum(k, depth), "betas": (0.9 + (depth - 1 - k) * 0.09 / depth, 0.999)}


METHOD = Method(
    name="nesterov",
    order="async_1f1b",
    forward=Latest(),
    backward=Stashed(),
    optimizer=OwnOptimizer("NAdam", constant_momentum),
    summary="stashing with NAdam, beta1 = 0.99; D-k copies",
    source="Ajanthan et al., Nesterov Method for Asynchronous Pipeline Parallel Optimization, ICML 2025 (arXiv 2505.01099)",
    deviations=(
        "The method is the optimizer: with another optimizer than its own it is PipeDream. Options as in the authors' public "
        "code: decoupled weight decay 0.01, momentum decay 0.004."
    ),
)

VARIANTS = (
    Method(
        name="nesterov+no_stash",
        order="async_1f1b",
        forward=Latest(),
        backward=Latest(),
        optimizer=OwnOptimizer("NAdam", rising_momentum),
        summary="no stashing, momentum rising with the delay; 1 copy",
        source="Ajanthan et al., ICML 2025, the variant without weight stashing",
        deviations="The authors also lower the learning rate of early stages; that is left to the user's learning rates.",
    ),
)
