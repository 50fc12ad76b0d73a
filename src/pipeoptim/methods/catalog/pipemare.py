"""PipeMare (Yang et al., MLSys 2021): a lower learning rate for older gradients, and a backward that looks back.

T1: ``lr_k = lr / tau^(1 - min(t/K, 1))``. T2: B on ``u = W - tau * delta``, delta an average of weight changes with
``g = decay^(1/tau)``. T3: synchronous training for the first updates. tau is the version gap of the stage.
"""

from __future__ import annotations

from functools import partial

from pipeoptim.methods.average_predictors import WeightDrift
from pipeoptim.methods.method import Method
from pipeoptim.schedule import Program
from pipeoptim.weights.sources import Latest, Predicted


def annealed(program: Program, k: int, t: int, anneal_updates: int) -> float:
    """T1: the factor on the learning rate of stage ``k`` for update ``t``."""
    # At least 1: the last stage has no delay, and 0 has no negative power.
    tau = max(1, program.steady_gap(k))
    return float(tau ** -(1.0 - min(t / anneal_updates, 1.0)))


def pipemare(anneal_updates: int = 1000, decay: float = 0.135, correct: bool = True, synchronous_updates: int = 0) -> Method:
    """PipeMare with its own settings.

    Args:
        anneal_updates: K of T1, updates until the learning rate is the user's on every stage; 0 switches T1 off.
        decay: D of T2, what is left of a weight change in delta after one delay.
        correct: T2; off, the backward runs on the latest weights.
        synchronous_updates: T3, how many updates run synchronously at first; 0 switches T3 off.

    Example:
        >>> pipemare(synchronous_updates=100).name
        'pipemare+T1+T2+T3'
    """
    parts = [("T1", anneal_updates > 0), ("T2", correct), ("T3", synchronous_updates > 0)]
    plain = (anneal_updates, decay, correct, synchronous_updates) == (1000, 0.135, True, 0)
    return Method(
        name="pipemare" if plain else "+".join(["pipemare", *(name for name, on in parts if on)]),
        order="async_1f1b",
        forward=Latest(),
        backward=Predicted() if correct else Latest(),
        predictor=partial(WeightDrift, decay=decay) if correct else None,
        lr_scale=partial(annealed, anneal_updates=anneal_updates) if anneal_updates else None,
        synchronous_updates=synchronous_updates,
        summary="lower lr for older gradients, B on weights corrected back by their average drift; 2 copies and the drift",
        source="Yang et al., PipeMare, MLSys 2021 (arXiv 1910.05124)",
        deviations=(
            "tau is the version gap counted in this engine's 1F1B order, not the (2(P-i)+1)/N of PipeMare's own order; below 1 "
            "it counts as 1. With T3, T1 begins when the synchronous part ends, which has no delay. K and decay have no defaults in "
            "the paper that fit every run: they are options."
        ),
    )


METHOD = pipemare()

FACTORY = pipemare
