"""One stage of a pipeline on a quadratic loss: its own action program, carried out on numbers that are linear in its state.

The loss of the stage is ``h x^2 / 2``, so everything that F, B and U compute is linear in what the stage holds between two
mini-batches: its weight, its momentum, and the weights that the micro-batches in flight were forwarded on. One mini-batch is then a
matrix, and training converges if all eigenvalues of it lie inside the unit circle. With M = 1 and a gap of s its characteristic
polynomial is, for SGD without prediction, ``z^(s+1) - z^s + lr h``; docs/theory.md has the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pipeoptim.schedule import Action, ActionKind, Program
from pipeoptim.stability.optimizers import LinearOptimizer
from pipeoptim.stability.predictions import KnownSoFar, Vector, prediction_called

OfMicrobatch = Callable[[int], int]
"""A number of updates for micro-batch i."""


@dataclass(frozen=True)
class LinearStage:
    """What determines how a stage trains on a quadratic.

    Args:
        program, k: its action program, and which stage of it.
        optimizer: its optimizer.
        prediction: kind of the prediction that F uses; "none" for the latest weights.
        ahead: how many updates F predicts ahead; by default the version gap, counted in the program.
        age: how many versions before the latest the weights are that F uses; by default none.
        discrepancy: share d of the curvature that enters through the weights of the backward, where these are the latest:
            ``g = h ((1 + d) x_F - d x_B)``. 0 for a backward on the forward's weights (PipeMare, arXiv 1910.05124, section 3.2).
    """

    program: Program
    k: int
    optimizer: LinearOptimizer
    prediction: str = "none"
    ahead: OfMicrobatch | None = None
    age: OfMicrobatch | None = None
    discrepancy: float = 0.0

    @property
    def largest_gap(self) -> int:
        """The most updates from the weights that F uses or predicts from to the B of the same micro-batch, in steady state."""
        steady = self.program.warm_up * self.program.microbatches
        batch = range(steady, steady + self.program.microbatches)
        return max(self.program.gap(self.k, i) + (0 if self.age is None else self.age(i)) for i in batch)

    def transition(self, rates: Vector) -> Vector:
        """The matrix of one mini-batch in steady state for each ``lr * h`` in ``rates``, shape (rates, state, state).

        Example:
            >>> from pipeoptim.stability.optimizers import linear_optimizer
            >>> stage = LinearStage(Program("async_1f1b", 2), 0, linear_optimizer("sgd"))
            >>> radius = abs(np.linalg.eigvals(stage.transition(np.array([0.9, 1.1])))).max(axis=1)
            >>> radius < 1  # a gap of 1: stable below 2 sin(pi / 6) = 1
            array([ True, False])
        """
        return _Steady(self, rates).matrices()


class _Steady:
    """One mini-batch of a stage whose warm-up is over, beginning from a state of unit vectors."""

    def __init__(self, stage: LinearStage, rates: Vector) -> None:
        program, self.stage, self.rates = stage.program, stage, rates[:, None]
        n = 2 * program.warm_up + 2  # steady: gaps and what is in flight repeat from mini-batch to mini-batch
        self.first, self.m = n * program.microbatches, program.microbatches
        done = [action for earlier in range(n) for action in program.step(stage.k, earlier)]
        backwards = {a.number for a in done if a.kind is ActionKind.B}
        self.in_flight = [a.number for a in done if a.kind is ActionKind.F and a.number not in backwards]
        updates = sum(a.kind is ActionKind.U for a in done)
        self.seen = len(backwards) - updates * self.m
        self.actions: list[Action] = program.step(stage.k, n)
        forwards = [a.number for a in self.actions if a.kind is ActionKind.F]
        self.versions = 1 if stage.age is None else 1 + max(map(stage.age, forwards))
        self.size = self.versions + 3 + len(self.in_flight)
        self.predict = prediction_called(stage.prediction)

    def matrices(self) -> Vector:
        unit = iter(np.broadcast_to(np.eye(self.size), (len(self.rates), self.size, self.size)).swapaxes(0, 1))
        self.history = [next(unit) for _ in range(self.versions)]  # latest version first
        self.momentum, self.gradient, self.partial = next(unit), next(unit), next(unit)
        self.used = {i: next(unit) for i in self.in_flight}
        for action in self.actions:
            {ActionKind.F: self.forward, ActionKind.B: self.backward, ActionKind.U: self.update}[action.kind](action.number)
        # The same places as at the beginning: those of a micro-batch are the next mini-batch's.
        later = [self.used[i + self.m] for i in self.in_flight]
        return np.stack([*self.history, self.momentum, self.gradient, self.partial, *later], axis=1)

    def forward(self, i: int) -> None:
        stage = self.stage
        x = self.history[0 if stage.age is None else stage.age(i)]
        known = KnownSoFar(x, self.momentum, self.gradient, self.partial, self.seen / self.m)
        s = stage.program.gap(stage.k, i) if stage.ahead is None else stage.ahead(i)
        self.used[i] = self.predict(stage.optimizer, known, s) if s else x

    def backward(self, i: int) -> None:
        d = self.stage.discrepancy
        point = (1 + d) * self.used.pop(i) - d * self.history[0]
        self.partial = self.partial + self.rates / self.m * point
        self.seen += 1

    def update(self, _: int) -> None:
        optimizer = self.stage.optimizer
        self.gradient, self.partial, self.seen = self.partial, 0 * self.partial, 0
        self.momentum = optimizer.decay * self.momentum + optimizer.feed * self.gradient
        latest = self.history[0] - optimizer.direct * self.gradient - optimizer.through * self.momentum
        self.history = [latest, *self.history[:-1]]
