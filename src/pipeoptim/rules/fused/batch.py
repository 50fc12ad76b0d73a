"""All parameters that one kernel steps in one call.

One call into C counts the steps of all tensors and one carries them out, and the coefficients of a step are computed once per param group
and step count instead of per parameter. Saved, together with the plan (`rules.fused.plan`): 605 -> 176 us per step of AdamW over 100 small
tensors, 50 -> 38 us over 4. ``pipeoptim bench predict`` shows the whole step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from pipeoptim.kernels import calls
from pipeoptim.rules.entries import ParameterEntry
from pipeoptim.rules.estimate import NO_GRADIENT, GradientEstimate, combined_estimate, momentum_of
from pipeoptim.rules.fused.steppers import Stepper
from pipeoptim.rules.horizon import NOTHING_SEEN, Horizon
from pipeoptim.rules.move import Ahead, Momentum, Scalar
from pipeoptim.rules.registry import Rule
from pipeoptim.rules.rule_moves import scaled_move


class BatchEstimates(NamedTuple):
    """The gradients of the next update, as far as they are known, of the parameters of a batch.

    Attributes:
        addresses: of what stands for the gradient of each parameter: the one in progress, or the mean where there is none yet.
        set_of: for each parameter the number of its set.
        samples: of each set a parameter, and its step count after the update.
        momenta: of that parameter the mean of its gradients.
        known: its estimate, whose factors are those of the whole set.
    """

    addresses: list[int]
    set_of: list[int]
    samples: list[tuple[int, float]]
    momenta: list[Momentum | None]
    known: list[GradientEstimate]

    def factors(self, scales: Sequence[Scalar]) -> list[calls.EstimateFactors]:
        """Of each set, for a kernel; ``scales``: what clipping multiplies its estimates by."""
        return [one.scaled(scale).kernel_factors for one, scale in zip(self.known, scales, strict=True)]


class StepperBatch:
    """The parameters that one stepper moves, all of which have a gradient.

    Args:
        stepper: of these parameters.
        entries: the parameters.
        out: a buffer for every parameter of the optimizer; None where none is predicted into a buffer.
        over_gradients: predictions are written over the gradients.

    Attributes:
        places: of the parameters, among all of the optimizer.
        kernel: carries out a step of all of them, given :meth:`job`.
    """

    def __init__(
        self, stepper: Stepper, entries: Sequence[ParameterEntry], out: Sequence[Tensor] | None, over_gradients: bool
    ) -> None:
        self.stepper, self.entries = stepper, entries
        self.places = [entry.number for entry in entries]
        self._takes_any_step = type(stepper).supports_step is Stepper.supports_step
        # None for optimizers that do not count (SGD).
        self._step_counts = [entry.state.get("step") for entry in entries]
        self._counters = calls.StepCounters(self._step_counts)
        tensors = [
            stepper.tensors(
                entry.weight,
                [entry.state[name] for name in stepper.state_names(entry.group)],
                None if out is None else out[entry.number],
            )
            for entry in entries
        ]
        self.kernel = calls.MultiTensorStep(tensors, over_gradients)
        # Of each: elements, and the addresses of the weight and, where the step keeps one, of the mean of gradients.
        self._weights_and_means = [
            (one[0].numel(), one[0].data_ptr(), 0 if one[1] is None else one[1].data_ptr()) for one in tensors
        ]
        self._groups = [entry.group_number for entry in entries]
        first_of = {group: n for n, group in reversed(list(enumerate(self._groups)))}  # reversed: the first one wins
        rank = {group: n for n, group in enumerate(first_of)}
        self._group_ranks, self._firsts = [rank[group] for group in self._groups], list(first_of.values())
        # Options are compared per group, not per parameter: parameters of a group share them.
        self._options = [(entries[n].group, stepper.state_names(entries[n].group)) for n in self._firsts]

    def job(self, grads: Sequence[Tensor | None], horizon: Horizon | None) -> tuple[list[int], list[int], list[Any]]:
        """The arguments of the kernel for the next step; with `horizon` also for the prediction after it. Counts the step.

        Args:
            grads: of every parameter of the optimizer.
            horizon: what to predict from.
        """
        # Only the parameters of this stepper, in its order.
        own = [grads[n] for n in self.places]
        set_of, samples = self._coefficient_sets(self._counters.add(1.0))
        sets = []  # one per param group and step count
        for first, t in samples:
            entry, grad = self.entries[first], own[first]
            assert grad is not None
            # One parameter stands for its set: the rule's numbers depend on group and t only.
            prediction = None if horizon is None else self._prediction_after(entry, t, grad, horizon)
            sets.append(self.stepper.coefficients(entry.group, t, prediction))
        return [grad.data_ptr() for grad in own if grad is not None], set_of, sets

    def estimates(self, values: Sequence[Tensor | None], horizon: Horizon) -> BatchEstimates | None:
        """What the gradients of the next update are estimated from; None where the kernel cannot take the next step.

        Args:
            values: of every parameter of the optimizer what stands for its gradient (`rules.fused.dry`).
            horizon: what to predict from.
        """
        own = [value.data_ptr() for n in self.places if (value := values[n]) is not None]
        shares = [horizon.share(n) for n in self.places] if horizon.in_progress else [NOTHING_SEEN]
        after = self._counts_after()
        if horizon.clip is not None and horizon.clip.max_norms is not None:  # each parameter has a factor of its own
            set_of, samples = list(range(len(after))), [(n, t or 1.0) for n, t in enumerate(after)]
        elif len(set(shares)) == 1:
            set_of, samples = self._coefficient_sets(after)
        else:  # some parameters have no gradient yet, say
            set_of, samples = _numbered([*zip(self._groups, after, shares, strict=True)], after)
        if not self._supports(samples):
            return None
        momenta = [momentum_of(self.entries[first]) for first, _ in samples]
        known = []
        for (first, _), momentum in zip(samples, momenta, strict=True):
            value, seen, factor = horizon.partial(self.entries[first]) or NO_GRADIENT
            found = combined_estimate(value if seen > 0 else None, seen, factor, horizon.clip, momentum)
            assert found is not None
            known.append(found)
        return BatchEstimates(own, set_of, samples, momenta, known)

    def estimate_parts(self, estimates: BatchEstimates) -> list[calls.EstimateParts]:
        """Where the estimates of this batch lie, for their norm."""
        factors = [known.kernel_factors for known in estimates.known]
        rows = zip(self._weights_and_means, estimates.addresses, estimates.set_of, strict=True)
        return [calls.EstimateParts(n, value, mean, w, factors[number]) for (n, w, mean), value, number in rows]

    def per_set(self, estimates: BatchEstimates, factor: Callable[[int], Scalar]) -> list[Scalar]:
        """What ``factor`` says of a parameter of each set."""
        return [factor(self.places[first]) for first, _ in estimates.samples]

    def dry_step(self, estimates: BatchEstimates, horizon: Horizon) -> calls.DryStep:
        """The kernel's dry step, which counts nothing."""
        pairs = zip(estimates.samples, estimates.known, strict=True)
        sets = [self._dry_coefficients(self.entries[first], known, t, horizon) for (first, t), known in pairs]
        return self.kernel.dry(estimates.addresses, estimates.set_of, sets)

    def _dry_coefficients(self, entry: ParameterEntry, known: GradientEstimate, t: float, horizon: Horizon) -> Any:
        """The numbers of a dry step to update t of this parameter, and of all that share its set, but for the estimate."""
        value = known.mean if known.value is None else known.value
        assert value is not None
        grad = value.detach()  # an object of its own, as `value` may be the mean, which terms are told apart from
        prediction = self._prediction(entry, t, grad, horizon.ahead(entry).from_state_after())
        return replace(self.stepper.coefficients(entry.group, t, prediction), dry=calls.NO_ESTIMATE)

    def _prediction_after(self, entry: ParameterEntry, t: float, grad: Tensor, horizon: Horizon) -> calls.KernelPrediction:
        """What to predict after step t of this parameter, and of all that share its set."""
        assert not horizon.in_progress, "what belongs to a single parameter cannot be shared by a group"
        if entry.kind == "none":
            return calls.KernelPrediction()
        if entry.kind == "displacement":
            return calls.KernelPrediction(steps=horizon.displacements(entry))
        return self._prediction(entry, t, grad, horizon.ahead(entry))

    def _prediction(self, entry: ParameterEntry, t: float, grad: Tensor, ahead: Ahead) -> calls.KernelPrediction:
        """The rule's answer. It reads numbers only, and of tensors which they are: those that the kernel has or will have."""
        state = {**entry.state, "step": t}  # t is known here; reading it from its tensor takes several us
        move = scaled_move(entry, entry.weight, state, grad, ahead)
        if move is None:
            return calls.KernelPrediction()
        assert not isinstance(move.keep, Tensor)
        return calls.KernelPrediction(1.0 - move.keep, self.stepper.prediction_factors(move, grad, state))

    def options_unchanged(self) -> bool:
        """Whether the options of every param group still need this kernel, with the same tensors."""
        return all(self.stepper.supports(g) and self.stepper.state_names(g) == names for g, names in self._options)

    def supports_next_step(self) -> bool:
        """Whether the kernel can take the next step."""
        # Nothing is counted before all batches are known to support it.
        return self._takes_any_step or self._supports(self._coefficient_sets(self._counts_after())[1])

    def _supports(self, samples: Sequence[tuple[int, float]]) -> bool:
        return self._takes_any_step or all(self.stepper.supports_step(self.entries[n].group, t) for n, t in samples)

    def _counts_after(self) -> list[float]:
        """The step count of each parameter after the next update; 0 where steps are not counted."""
        now = self._counters.add(0.0)  # adding 0 reads the counts in one call
        return [0.0 if step is None else count + 1 for step, count in zip(self._step_counts, now, strict=True)]

    def _coefficient_sets(self, counts: Sequence[float]) -> tuple[list[int], list[tuple[int, float]]]:
        """Parameters of one group at the same step share all numbers: of each parameter the number of its set, and of each set
        a parameter that has it, with its step t.
        """
        if len(set(counts)) == 1:  # the usual case: then a group is a set
            return self._group_ranks, [(n, counts[n] or 1.0) for n in self._firsts]
        return _numbered([*zip(self._groups, counts, strict=True)], counts)


def _numbered(keys: Sequence[Hashable], counts: Sequence[float]) -> tuple[list[int], list[tuple[int, float]]]:
    """As `StepperBatch._coefficient_sets`, for parameters that share all numbers if they share their key."""
    number_of: dict[Hashable, int] = {}
    samples = []
    set_of = []
    for n, key in enumerate(keys):
        if key not in number_of:
            number_of[key] = len(number_of)
            samples.append((n, counts[n] or 1.0))
        set_of.append(number_of[key])
    return set_of, samples


def stepper_of(rule: Rule | None) -> Stepper | None:
    """The stepper of the rule's own class only: a subclass may predict something that the kernel does not compute."""
    return vars(type(rule)).get("stepper") if rule is not None else None
