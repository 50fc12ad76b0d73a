"""Which weights the next forward of a stage runs on: chosen, and predicted, before its input is there."""

from __future__ import annotations

from collections.abc import Sequence

from pipeoptim.engine.stage.displacement_samples import DisplacementSamples
from pipeoptim.methods import Method
from pipeoptim.weights import StageWeights, WeightSet


class ForwardWeights:
    """Chooses the weights of each forward by the method's source.

    Args:
        method: says where they come from.
        weights: all live versions of the stage.
        observers: measure predictions.

    Attributes:
        next_forward: number of the micro-batch whose forward is next, counted from the last (re)start.
        chosen: the weights of that forward, once it is known that no update comes before it.
    """

    def __init__(self, method: Method, weights: StageWeights, observers: Sequence[DisplacementSamples]) -> None:
        self.source, self.weights, self.observers = method.forward, weights, observers
        self.next_forward = 0
        self.chosen: WeightSet | None = None
        self._chosen_for = -1

    def choose(self, i: int) -> None:
        """Choose the weights of forward ``i`` now, unless that was done."""
        if self.chosen is None:
            self.chosen = found = self.source.acquire(self.weights, i)
            self._chosen_for = i
            version, steps, seen = found.key
            if self.observers and found.copy is not None and steps:  # of a plain copy there is nothing to measure
                for observer in self.observers:
                    observer.predicted(version, steps, self.weights.params, found.copy.tensors, seen)

    def take(self, i: int) -> WeightSet:
        """Those of forward ``i``, which the caller releases."""
        assert self.chosen is not None and i == self._chosen_for, f"F{i} out of order"
        found, self.chosen = self.chosen, None
        return found

    def note_forward(self, i: int) -> None:
        """Forward ``i`` was made."""
        self.next_forward = i + 1
        self.retain()

    def retain(self) -> None:
        """Keep the versions that coming forwards will ask for by number."""
        oldest = self.source.oldest_needed(self.weights, self.next_forward)
        if oldest is not None:
            self.weights.retain(oldest)

    def steps_ahead(self) -> int:
        """The steps that the first predicting forward after the present update will ask for; 0 if none does."""
        program, k = self.weights.program, self.weights.k
        # No further than one mini-batch: the next update drops predictions that nobody has used. From gradients of the mini-batch in
        # progress no further than the next forward: more of them are there for every later one.
        coming = range(self.next_forward, self.next_forward + (program.microbatches if self.weights.progress is None else 1))
        for i in coming:
            if steps := self.source.steps_ahead(program, k, i):
                return steps
        return 0

    def restart(self) -> None:
        """Nothing is in flight: the next micro-batch is number 0 again."""
        if self.chosen is not None:
            # prepare() may have acquired a set for a forward that never came.
            self.weights.release(self.chosen)
        self.chosen, self.next_forward = None, 0
        # Nothing older than the next version is needed: this releases all that was retained.
        self.weights.retain(self.weights.version + 1)
        self.weights.restart = self.weights.version
        # They were made for another place in the order, with another number of steps ahead.
        self.weights.forget_predictions()
