"""What each stage of a scenario takes: seconds of its actions, bytes of its messages and of what it keeps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

from pipeoptim.methods import WeightPasses, copies, weight_passes
from pipeoptim.schedule import ActionKind, Program
from pipeoptim.simulate.scenario import Scenario

Moment = tuple[int, int]
"""Micro-batches in flight, and gradients of the weights: 0 or 1."""

MOST_ACTIONS = 300_000
"""Of all stages, walked through in two or three seconds to count copies and predictions."""


@dataclass(frozen=True)
class StageCost:
    """One stage; seconds and bytes of a micro-batch, but for U, weights and what belongs to them.

    Attributes:
        forward, backward, update: seconds of F, B and U, what the engine adds included.
        predict: seconds of one prediction.
        passes: predictions and copies in a mini-batch.
        sent_bytes: of an activation for the next stage, 0 on the last.
        returned_bytes: of a gradient for the stage before, 0 on the first.
        weight_bytes: of the latest weights.
        copies: of the weights at most, the latest included; None where there are too many stages to count them.
        saved_bytes: kept from F to B.
        rebuilt_bytes: of one block, which a B that computes activations again has at a time; 0 where they are kept.
        state_bytes: of the optimizer.
        moments: as for :func:`moments`; empty where there are too many stages to count.
    """

    forward: float
    backward: float
    update: float
    predict: float
    passes: WeightPasses
    sent_bytes: float
    returned_bytes: float
    weight_bytes: float
    copies: int | None
    saved_bytes: float
    rebuilt_bytes: float
    state_bytes: float
    moments: tuple[Moment, ...]

    def memory(self) -> float | None:
        """Peak bytes at the end of an action: weights and their copies, gradient, optimizer state, activations."""
        if self.copies is None:
            return None
        held = max(flying * self.saved_bytes + there * self.weight_bytes for flying, there in self.moments)
        return self.weight_bytes * self.copies + self.state_bytes + held + self.rebuilt_bytes


@lru_cache(maxsize=1024)
def moments(program: Program, k: int) -> tuple[Moment, ...]:
    """What stage ``k`` holds when an action is over: micro-batches in flight, and whether a gradient is there (1) or not (0).

    A gradient is there from the first B of a mini-batch to its U, which frees it. Moments that others exceed are left out.

    Example:
        >>> from pipeoptim.methods import get_method
        >>> naive = get_method("naive")
        >>> moments(naive.program(4, 1), 0), moments(naive.program(4, 4), 0)
        (((4, 0), (3, 1)), ((4, 1),))
    """
    flying, there, found = 0, 0, {0: 0, 1: 0}
    for action in program.full(k, minibatches=2 * program.warm_up + 2):
        flying += {ActionKind.F: 1, ActionKind.B: -1, ActionKind.U: 0}[action.kind]
        there = {ActionKind.F: there, ActionKind.B: 1, ActionKind.U: 0}[action.kind]
        found[there] = max(found[there], flying)
    return ((found[0], 0), (found[1], 1)) if found[0] > found[1] else ((found[1], 1),)


@dataclass(frozen=True)
class PlanBytes:
    """What a run stores and sends.

    Attributes:
        weights, state: of the model and of its optimizer, as a checkpoint holds them, of one replica.
        sent: over each boundary between stages in a mini-batch, activations forth and gradients back, of all replicas.
    """

    weights: float
    state: float
    sent: tuple[float, ...]


def plan_bytes(scenario: Scenario) -> PlanBytes:
    """Of a scenario."""
    costs = stage_costs(scenario)
    parts = scenario.program.microbatches * scenario.replicas
    sent = tuple(parts * (one.sent_bytes + other.returned_bytes) for one, other in pairwise(costs))
    return PlanBytes(sum(one.weight_bytes for one in costs), sum(one.state_bytes for one in costs), sent)


def countable(program: Program) -> bool:
    """Whether copies and predictions of all stages are counted, which takes a walk through each stage's steady state."""
    return program.depth * (2 * program.warm_up + 2) * (2 * program.microbatches + 1) <= MOST_ACTIONS


def stage_costs(scenario: Scenario) -> list[StageCost]:
    """Of every stage."""
    ends = [0, *accumulate(scenario.lengths)]
    counts = countable(scenario.program)
    return [_stage(scenario, k, start, end, counts) for k, (start, end) in enumerate(pairwise(ends))]


def _stage(scenario: Scenario, k: int, start: int, end: int, counts: bool) -> StageCost:
    profile, rows, optimizer = scenario.profile, scenario.rows, scenario.profile.optimizer
    blocks, slower = profile.blocks[start:end], scenario.conditions.stragglers.get(k, 1.0)
    first, last = k == 0, k == scenario.program.depth - 1

    def total(name: str) -> float:
        return sum(profile.at(getattr(block, name), rows) for block in blocks)

    def moved(name: str) -> float:
        """Seconds that the messages of that kind cost this stage, which receives one and sends one."""
        ends = ([] if first else [start - 1]) + ([] if last else [end - 1])
        return profile.link.handling * sum(profile.at(getattr(profile.blocks[n], name), rows) for n in ends)

    weights = sum(block.weight_bytes for block in blocks)
    refresh = scenario.refresh if scenario.method.predicts_by_rule else None
    passes = weight_passes(scenario.method, scenario.program, k, refresh) if counts else _assumed(scenario, last)
    step = (optimizer.rule_step if scenario.method.predicts_by_rule else None) or optimizer.step
    update = step.seconds(weights) + (optimizer.copy.seconds(weights) if passes.copied else 0.0)
    again = total("forward") if scenario.recompute else 0.0
    saved = total("saved_bytes") - sum(profile.at(block.shared_bytes, rows) for block in blocks[1:])
    rebuilt = 0.0
    if scenario.recompute:
        # Every block keeps its input only: what the block before it returned.
        inputs = [profile.at(profile.blocks[max(0, n - 1)].output_bytes, rows) for n in range(start, end)]
        saved, rebuilt = sum(inputs), max(profile.at(block.saved_bytes, rows) for block in blocks)
    return StageCost(
        forward=slower * (total("forward") + moved("output_bytes") + profile.action["F"]),
        backward=slower * (total("backward") + again + moved("gradient_bytes") + profile.action["B"]),
        update=slower * (update + profile.action["U"]),
        predict=slower * optimizer.predict.seconds(weights),
        passes=passes,
        sent_bytes=0.0 if last else profile.at(blocks[-1].output_bytes, rows),
        returned_bytes=0.0 if first else profile.at(profile.blocks[start - 1].gradient_bytes, rows),
        weight_bytes=weights,
        copies=_copies(scenario, k, refresh) if counts else None,
        saved_bytes=saved,
        rebuilt_bytes=rebuilt,
        state_bytes=optimizer.state_bytes * weights,
        moments=moments(scenario.program, k) if counts else (),
    )


def _copies(scenario: Scenario, k: int, refresh: int | None) -> int:
    program = scenario.program
    keep_forward = scenario.recompute == "forward"
    return copies(scenario.method, program.depth, program.microbatches, k, keep_forward, program, refresh)


def _assumed(scenario: Scenario, last: bool) -> WeightPasses:
    """Where there is too much to count: one prediction of each kind per mini-batch, but none on the last stage."""
    method, others = scenario.method, (False,) * (scenario.program.microbatches - 1)
    forward, backward = (not last and source.predicts for source in (method.forward, method.backward))
    return WeightPasses((forward, *others), (backward, *others), method.backward.reuses_forward and not method.predicts)
