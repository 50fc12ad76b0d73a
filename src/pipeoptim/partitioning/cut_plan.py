"""The best plan for given block costs and a request: which blocks each stage has, and on how many devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import inf

from pipeoptim.errors import ConfigError
from pipeoptim.methods import Method, copies
from pipeoptim.partitioning.balance import best_cut, best_replicated_cut, shared
from pipeoptim.partitioning.block_costs import BlockCost
from pipeoptim.partitioning.shared_weights import SharedWeight
from pipeoptim.schedule import Slack, common_delay


@dataclass(frozen=True)
class CutRequest:
    """What :func:`~pipeoptim.partitioning.partition` was asked for, checked; ``allowed``: blocks behind which one may cut."""

    stages: int | None
    method: Method
    microbatches: int
    speeds: Sequence[float] | None
    memory: Sequence[int] | None
    devices: int | None
    bandwidth: float | None
    pins: set[int]
    allowed: set[int]
    slack: Slack = 0.0
    refresh: int | None = None


@dataclass(frozen=True)
class CutPlan:
    """Per stage: its range of blocks, its devices, its seconds and bytes."""

    ranges: list[tuple[int, int]]
    replicas: list[int]
    seconds: list[float]
    memory: list[int]


def choose_cut(costs: list[BlockCost], request: CutRequest, shared_by: Sequence[SharedWeight] = ()) -> CutPlan:
    """The plan whose slowest stage is the fastest; among equals the one with the fewest stages.

    ``shared_by``: weights that several blocks count.

    Raises:
        ConfigError: there is none.
    """
    if request.devices is None or request.stages is not None:
        return _of_depth(costs, request, request.stages or 1, shared_by)
    plans, refused = [], None
    for depth in range(1, min(request.devices, len(costs)) + 1):
        try:
            plans.append(_of_depth(costs, request, depth, shared_by))
        except ConfigError as error:
            refused = refused or error
    if not plans:
        assert refused is not None
        raise refused
    return min(plans, key=lambda plan: max(plan.seconds))


def _of_depth(costs: list[BlockCost], request: CutRequest, depth: int, shared_by: Sequence[SharedWeight]) -> CutPlan:
    blocks = len(costs)
    if len(request.allowed) < depth - 1:
        raise ConfigError(
            f"num_stages is {depth}, but only {len(request.allowed)} of the {blocks - 1} places between the model's layers can be "
            "cut: elsewhere more than a layer's own output is used later; use fewer stages, name other layers, or partition with "
            'how="trace"'
        )
    scale = _StageCosts(costs, request, depth, shared_by)
    limits: Sequence[float] = request.memory or [inf]

    def cost(k: int, start: int, end: int, m: int) -> float:
        forbidden = any(start < pin < end for pin in request.pins) or (end < blocks and end - 1 not in request.allowed)
        return inf if forbidden or scale.memory(k, start, end) > limits[k % len(limits)] else scale.seconds(k, start, end, m)

    if request.devices is None:
        lengths, replicas = best_cut(blocks, depth, lambda k, start, end: cost(k, start, end, 1)), [1] * depth
    else:
        largest, lengths, replicas = best_replicated_cut(blocks, depth, request.devices, cost)
        if largest == inf:
            raise ConfigError(
                f"{blocks} blocks cannot be cut into {depth} stages on {request.devices} devices under these limits; use other "
                "pins, more memory or another number of stages"
            )
    ranges = list(pairwise([0, *accumulate(lengths)]))
    seconds = [scale.seconds(k, *r, m) for k, (r, m) in enumerate(zip(ranges, replicas, strict=True))]
    return CutPlan(ranges, replicas, seconds, [scale.memory(k, *r) for k, r in enumerate(ranges)])


class _StageCosts:
    """Seconds and bytes of a range of blocks as a stage."""

    def __init__(self, costs: list[BlockCost], request: CutRequest, depth: int, shared_by: Sequence[SharedWeight]) -> None:
        self.shared_by = shared_by
        self.costs, self.m, self.bandwidth = costs, request.microbatches, request.bandwidth
        self.speeds = request.speeds or [1.0] * depth
        program = request.method.program(depth, self.m, slack=request.slack)
        refresh = request.refresh if request.method.predicts_by_rule else None
        self.copies = [copies(request.method, depth, self.m, k, program=program, refresh=refresh) for k in range(depth)]
        self.in_flight = [program.in_flight(k) for k in range(depth)]
        self._delay = common_delay(program, (0, depth - 1)) if shared_by else 0  # of gradients of shared weights, at most
        self._time = [0.0, *accumulate(c.seconds for c in costs)]
        self._size = [0, *accumulate(c.weight_bytes for c in costs)]
        self._saved = [0, *accumulate(c.saved_bytes for c in costs)]

    def seconds(self, k: int, start: int, end: int, replicas: int) -> float:
        own = (self._time[end] - self._time[start]) / self.speeds[k]
        if self.bandwidth is None:
            return own
        # Twice: the activation forwards, and its gradient, of the same size, backwards.
        sends = 2 * self.costs[end - 1].output_bytes / self.bandwidth if end < len(self.costs) else 0.0
        return max(shared(own, self.weight_bytes(start, end), replicas, self.bandwidth), sends / replicas)

    def weight_bytes(self, start: int, end: int) -> int:
        """Of the blocks ``start .. end-1``; a weight that several of them use is there once."""
        twice = sum(weight.nbytes * max(0, weight.inside(start, end) - 1) for weight in self.shared_by)
        return self._size[end] - self._size[start] - twice

    def memory(self, k: int, start: int, end: int) -> int:
        # Costs are per mini-batch, activations in flight are counted in micro-batches.
        saved = (self._saved[end] - self._saved[start]) // self.m
        elsewhere = (w.nbytes for w in self.shared_by if 0 < w.inside(start, end) < len(w.blocks))
        sums = self._delay * sum(elsewhere)
        # One more than the copies: the gradient.
        return self.weight_bytes(start, end) * (self.copies[k] + 1) + sums + saved * self.in_flight[k]
