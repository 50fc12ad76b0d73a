"""The best way to train a model on given devices: depth, replicas, M, method, slack, recomputation and cut, by simulation.

Best first: a queue holds every shape (method, D, replicas, M, slack, recomputation) with a lower bound of what it can reach, which is
the work over the devices. The shape with the least bound gets its best cut, by dynamic programming under the memory limit, and with it
a closer bound, the work of its busiest stage; or, if it has one, is simulated. When a simulated one comes to the head of the queue, no
other can be better by more than the tolerance that it is put ahead.
"""

from __future__ import annotations

import heapq
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial, reduce
from itertools import count
from math import ceil, inf

import numpy as np

from pipeoptim.errors import ConfigError, counted
from pipeoptim.methods import Method, copies
from pipeoptim.partitioning.balance import best_cut_by_costs
from pipeoptim.schedule import ORDERS, Program
from pipeoptim.simulate.cluster import Cluster
from pipeoptim.simulate.profile import Profile
from pipeoptim.simulate.result import Simulation
from pipeoptim.simulate.scenario import MOST_CUT, Conditions, Scenario
from pipeoptim.simulate.simulate import simulate
from pipeoptim.simulate.stage_costs import countable, moments, stage_costs

TOLERANCE = 0.005
"""A plan that is better by less is none that could be told apart."""

Goal = tuple[float, float]
"""What is to be least, and what breaks ties."""

PlanKey = tuple[str, int, int, int, float, str]

OBJECTIVES = ("time", "cost", "memory")


@dataclass(frozen=True)
class PlanRequest:
    """What is searched for.

    Attributes:
        profile, cluster: of the model, of the devices.
        methods: that may train.
        microbatches: numbers M that are tried; by default the powers of two that divide the mini-batch.
        slacks, recompute: that are tried.
        objective: "time": seconds per mini-batch. "cost": those times the devices that are used. "memory": of the fullest device.
        stages: depths that are tried; all that fit by default.
        seconds: after which the best that was found so far is taken, and no more alternatives are looked for.
        looked: told how many shapes were cut and how many simulated, as it goes on.
    """

    profile: Profile
    cluster: Cluster
    methods: Sequence[Method]
    microbatches: Sequence[int] = ()
    slacks: Sequence[float] = (0.0, 1.0)
    recompute: Sequence[str] = ("", "backward")
    objective: str = "time"
    stages: Sequence[int] = ()
    seconds: float = inf
    looked: Callable[[int, int], None] | None = None

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"objective is {self.objective!r}, must be one of {', '.join(OBJECTIVES)}")
        if len(self.profile.blocks) > MOST_CUT:
            raise ConfigError(
                f"{counted(len(self.profile.blocks), 'block')} are more than the {MOST_CUT:,} that a cut is looked for of; profile the "
                "model in larger blocks"
            )

    @cached_property
    def block_sums(self) -> Callable[[int, str], _BlockSums]:
        """By rows of a micro-batch and recomputation: a few, which thousands of shapes ask for."""
        return cache(partial(_block_sums, self.profile))


@dataclass(frozen=True)
class PlanShape:
    """What is chosen before a cut.

    Attributes:
        method, program, replicas, recompute: of the scenario.
        together: whether the replicas of a stage are neighbours in the cluster, else the stages of a replica.
    """

    method: Method
    program: Program
    replicas: int
    recompute: str
    together: bool

    def key(self) -> PlanKey:
        """Method, D, replicas, M, slack and recomputation."""
        program = self.program
        slack = program.slack if isinstance(program.slack, float) else max(program.slack)
        return self.method.name, program.depth, self.replicas, program.microbatches, slack, self.recompute

    def devices(self) -> list[list[int]]:
        """Of each stage, one for each replica."""
        depth, replicas = self.program.depth, self.replicas
        if self.together:
            return [[k * replicas + r for r in range(replicas)] for k in range(depth)]
        return [[r * depth + k for r in range(replicas)] for k in range(depth)]


@dataclass(frozen=True)
class Candidate:
    """A way to train.

    Attributes:
        shape, scenario: what runs.
        bound: seconds per mini-batch that it takes at least.
        memory: bytes of its fullest device.
    """

    shape: PlanShape
    scenario: Scenario
    bound: float
    memory: float

    @property
    def devices(self) -> int:
        """That it uses."""
        return self.scenario.program.depth * self.scenario.replicas

    @property
    def runs_as_it_is(self) -> bool:
        """Whether the profile says which run it is of, so that :meth:`command` trains its model."""
        return "train" in self.scenario.profile.made

    def command(self) -> str:
        """The command line that runs it; with places to fill in, where the profile does not say which model and data it is of."""
        s, p = self.scenario, self.scenario.program
        named = s.profile.made.get("train", ["--model", "MODULE:FUNCTION", "--data", "MODULE:FUNCTION"])
        parts = [f"pipeoptim train {shlex.join(map(str, named))} --method {s.method.name} --stages {p.depth}"]
        parts += [f"--microbatches {p.microbatches} --cut {','.join(map(str, s.lengths))} --engine processes"]
        parts += [f"--slack {self.shape.key()[4]:g}"] if p.slack else []
        parts += [f"--recompute {s.recompute}"] if s.recompute else []
        parts += [f"--replicas {s.replicas}"] if s.replicas > 1 else []
        return " ".join(parts)


@dataclass(frozen=True)
class RankedPlan:
    """A candidate and what its simulation found; ``goal`` is least for the best."""

    candidate: Candidate
    simulation: Simulation
    goal: Goal

    @property
    def seconds(self) -> float:
        """Per mini-batch."""
        return 1 / self.simulation.throughput.median


@dataclass(frozen=True)
class FoundPlans:
    """What a search found.

    Attributes:
        best: the plan.
        alternatives: the best of those that differ from it in one respect: which, and the plan; None where nothing else fits, or where
            none had been simulated when the time was over.
        shapes: that there were.
        model: of the profile.
        bound: what no plan goes below, where the search ended before its end; None where the plan is the best.
        ended: whether the time was over before the alternatives were complete.
    """

    best: RankedPlan
    alternatives: dict[str, RankedPlan | None]
    shapes: int
    model: str
    bound: float | None = None
    ended: bool = False

    @property
    def may_gain(self) -> float | None:
        """By what share another way may be better at most; None where the plan is the best."""
        least = self.best.goal[0]
        return None if self.bound is None or least == 0 else 1 - self.bound / least

    def loss(self, other: RankedPlan) -> float:
        """By what share ``other`` is worse than the best."""
        least, value = self.best.goal[0], other.goal[0]
        if least == 0:  # a profile in which nothing takes time
            return inf if value else 0.0
        return value / least - 1


RESPECTS = {"method": (0,), "stages or replicas": (1, 2), "micro-batches": (3,), "slack": (4,), "recomputation": (5,)}
"""In which plans differ, and their places in a key."""


def find_plans(request: PlanRequest) -> FoundPlans:
    """The best plan and its nearest alternatives.

    Raises:
        ConfigError: nothing fits.
    """
    search = _Search(request)
    best = search.best()
    if best is None:
        raise ConfigError(
            f"no way to train {request.profile.model} on {len(request.cluster.speeds)} devices of "
            f"{request.cluster.memory / 2**30:.3g} GiB was found; give more memory or devices, or other micro-batches or methods"
        )
    bound, own = search.bound, best.candidate.shape.key()
    others = {name: search.best(own, places) for name, places in RESPECTS.items()}
    return FoundPlans(best, others, len(search.shapes), request.profile.model, bound, search.ended)


class _Search:
    """All shapes of a request, and what is known of them."""

    def __init__(self, request: PlanRequest) -> None:
        self.request = request
        self._ends = time.monotonic() + request.seconds
        bounds = ((shape, *_rough_bound(request, shape)) for shape in _shapes(request))
        self.shapes = [(shape, s, memory) for shape, s, memory in bounds if memory <= request.cluster.memory]
        self._cuts: dict[PlanShape, Candidate | None] = {}
        self._plans: dict[PlanShape, RankedPlan] = {}
        self.bound: float | None = None
        """What no plan of the last search goes below, where it ended before its end."""
        self.ended = False
        """Whether a search ended before its end."""

    def best(self, unlike: PlanKey | None = None, places: Sequence[int] = ()) -> RankedPlan | None:
        """The best plan, of those whose key is ``unlike`` that one in one of the ``places``; None where none fits.

        When the time is over it is the best of those that were simulated; where nothing was, the most promising of those that were cut
        still is.
        """
        queue: list[tuple[Goal, int, PlanShape | Candidate | RankedPlan]] = []
        numbers = count()  # of equal goals the one that came first

        def push(goal: Goal, what: PlanShape | Candidate | RankedPlan) -> None:
            heapq.heappush(queue, (goal, next(numbers), what))

        for shape, seconds, memory in self.shapes:
            if _differs(shape, unlike, places):
                push(_goal(self.request, shape, seconds, memory), shape)
        self.bound = None
        while queue:
            (least, _), _, head = heapq.heappop(queue)
            if isinstance(head, RankedPlan):
                return head
            if self.request.looked is not None:
                self.request.looked(len(self._cuts), len(self._plans))
            if time.monotonic() > self._ends and any(self._cuts.values()):
                self.bound, self.ended = least, True
                return self._best_so_far(unlike, places)
            if isinstance(head, Candidate):
                plan = self._simulated(head)
                push((plan.goal[0] * (1 - TOLERANCE), plan.goal[1]), plan)
            elif (cut := self._cut(head)) is not None:
                push(_goal(self.request, head, cut.bound, cut.memory), cut)
        return None

    def _best_so_far(self, unlike: PlanKey | None, places: Sequence[int]) -> RankedPlan | None:
        if not self._plans:
            cuts = [cut for cut in self._cuts.values() if cut is not None]
            self._simulated(min(cuts, key=lambda cut: _goal(self.request, cut.shape, cut.bound, cut.memory)))
        known = (plan for shape, plan in self._plans.items() if _differs(shape, unlike, places))
        return min(known, key=lambda plan: plan.goal, default=None)

    def _cut(self, shape: PlanShape) -> Candidate | None:
        if shape not in self._cuts:
            self._cuts[shape] = _cut(self.request, shape)
        return self._cuts[shape]

    def _simulated(self, candidate: Candidate) -> RankedPlan:
        shape = candidate.shape
        if shape not in self._plans:
            simulation = simulate(candidate.scenario)
            goal = _goal(self.request, shape, 1 / simulation.throughput.median, candidate.memory)
            self._plans[shape] = RankedPlan(candidate, simulation, goal)
        return self._plans[shape]


def _differs(shape: PlanShape, unlike: PlanKey | None, places: Sequence[int]) -> bool:
    return unlike is None or any(shape.key()[place] != unlike[place] for place in places)


def _goal(request: PlanRequest, shape: PlanShape, seconds: float, memory: float) -> Goal:
    devices = shape.program.depth * shape.replicas
    value = {"time": seconds, "cost": seconds * devices, "memory": memory}[request.objective]
    return value, seconds if request.objective == "memory" else memory


def _shapes(request: PlanRequest) -> Iterator[PlanShape]:
    """All that the numbers of devices, blocks and rows allow."""
    devices, blocks, rows = len(request.cluster.speeds), len(request.profile.blocks), request.profile.batch_rows
    for depth in request.stages or range(1, min(devices, blocks) + 1):
        for replicas in range(1, devices // depth + 1):
            if rows % replicas:
                continue
            for m in request.microbatches or _powers(rows // replicas):
                if (rows // replicas) % m or not _profiled(request.profile, rows // replicas // m):
                    continue
                for method in request.methods:
                    yield from _of_method(request, method, depth, replicas, m)


def _powers(most: int) -> list[int]:
    return [2**n for n in range(most.bit_length()) if most % 2**n == 0]


def _profiled(profile: Profile, rows: int) -> bool:
    return profile.rows[0] <= rows <= profile.rows[-1]


def _of_method(request: PlanRequest, method: Method, depth: int, replicas: int, m: int) -> Iterator[PlanShape]:
    for slack in request.slacks if not ORDERS[method.order].flushes and depth > 1 else (0.0,):
        try:
            program = method.program(depth, m, slack=slack)
        except ConfigError:  # the method is not defined for these numbers
            continue
        if not countable(program):
            continue
        for recompute in request.recompute:
            for together in (True, False) if replicas > 1 and depth > 1 else (True,):
                yield PlanShape(method, program, replicas, recompute, together)


def _rough_bound(request: PlanRequest, shape: PlanShape) -> tuple[float, float]:
    """Seconds and bytes that no cut of a shape goes below."""
    cluster, profile, program = request.cluster, request.profile, shape.program
    m = program.microbatches
    speeds = [min(cluster.speeds[d] for d in own) for own in shape.devices()]
    blocks = request.block_sums(profile.batch_rows // (shape.replicas * m), shape.recompute)
    work = float(blocks.seconds[-1])
    busiest = max(work / sum(speeds), float(np.diff(blocks.seconds).max()) / max(speeds))
    weights = max(float(blocks.weights[-1]) / program.depth, float(np.diff(blocks.weights).max()))
    return _at_least(shape, busiest, work / max(speeds)), weights * (2 + profile.optimizer.state_bytes)


def _at_least(shape: PlanShape, busiest: float, way: float) -> float:
    """Seconds of a mini-batch, from those of a micro-batch: of F and B on the busiest stage, and on all stages one after the other."""
    m = shape.program.microbatches
    return (m - 1) * busiest + way if shape.program.flushes else m * busiest


def _cut(request: PlanRequest, shape: PlanShape) -> Candidate | None:
    """The cut whose busiest stage is the fastest, under the memory limit; None where none fits."""
    cluster, profile, program, replicas = request.cluster, request.profile, shape.program, shape.replicas
    depth, m, devices = program.depth, program.microbatches, shape.devices()
    speeds = [min(cluster.speeds[d] for d in own) for own in devices]
    blocks = request.block_sums(profile.batch_rows // (replicas * m), shape.recompute)
    keep_forward = shape.recompute == "forward"
    most = [copies(shape.method, depth, m, k, keep_forward, program) for k in range(depth)]
    weights = blocks.weights[None, :] - blocks.weights[:, None]
    # A stage's first block shares nothing: what is before it is elsewhere.
    after_first = np.append(blocks.shared[1:], blocks.shared[-1])
    held = blocks.saved[None, :] - blocks.saved[:, None] - (blocks.shared[None, :] - after_first[:, None])
    seconds = m * (blocks.seconds[None, :] - blocks.seconds[:, None])
    order = np.arange(len(blocks.weights))
    empty = order[None, :] <= order[:, None]

    def of_stage(k: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        at_once = reduce(np.maximum, (flying * held + there * weights for flying, there in moments(program, k)))
        memory = weights * (most[k] + profile.optimizer.state_bytes) + at_once
        return np.where(empty | (memory > cluster.memory), inf, seconds / speeds[k])

    try:
        lengths = best_cut_by_costs(len(profile.blocks), depth, of_stage)
    except ConfigError:
        return None
    boundaries = [cluster.slowest(zip(devices[k], devices[k + 1], strict=True)) for k in range(depth - 1)]
    within = None
    if replicas > 1:
        within = cluster.slowest((own[r], own[r - 1]) for own in devices for r in range(replicas))
    scenario = Scenario(
        profile,
        tuple(lengths),
        shape.method,
        program,
        _enough(program),
        replicas,
        recompute=shape.recompute,
        replica_link=within,
        conditions=Conditions(
            delay=tuple(link.latency for link in boundaries),
            bandwidth=tuple(link.bandwidth or inf for link in boundaries),
            jitter=0.0,
            stragglers={k: 1 / speed for k, speed in enumerate(speeds) if speed != 1},
        ),
    )
    costs = stage_costs(scenario)
    memory = max(cost.memory() or inf for cost in costs)
    if memory > cluster.memory:  # with the block that is computed again
        return None
    both = [cost.forward + cost.backward for cost in costs]
    bound = _at_least(shape, max(both), sum(both)) + min(cost.update for cost in costs)
    return Candidate(shape, scenario, bound, memory)


def _enough(program: Program) -> int:
    """Mini-batches in which the steady state shows."""
    return 8 + 3 * ceil(program.in_flight(0) / program.microbatches)


@dataclass(frozen=True)
class _BlockSums:
    """Sums over the blocks before each: seconds of F and B, bytes kept and shared of a micro-batch, bytes of weights."""

    seconds: np.ndarray[tuple[int, ...], np.dtype[np.float64]]
    saved: np.ndarray[tuple[int, ...], np.dtype[np.float64]]
    shared: np.ndarray[tuple[int, ...], np.dtype[np.float64]]
    weights: np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def _block_sums(profile: Profile, rows: int, recompute: str) -> _BlockSums:
    def sums(values: Iterator[float]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        found: np.ndarray[tuple[int, ...], np.dtype[np.float64]] = np.concatenate(([0.0], np.cumsum(list(values))))
        return found

    blocks = profile.blocks
    again = 2 if recompute else 1
    seconds = (again * profile.at(b.forward, rows) + profile.at(b.backward, rows) for b in blocks)
    if recompute:
        saved = (profile.at(blocks[max(0, n - 1)].output_bytes, rows) for n in range(len(blocks)))
        shared = (0.0 for _ in blocks)
    else:
        saved = (profile.at(b.saved_bytes, rows) for b in blocks)
        shared = (profile.at(b.shared_bytes, rows) for b in blocks)
    return _BlockSums(sums(seconds), sums(saved), sums(shared), sums(b.weight_bytes for b in blocks))
