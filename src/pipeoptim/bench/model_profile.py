"""A profile of a model on this machine, for ``pipeoptim simulate``: measured by the engine itself, in training.

F and B of every block are measured within one stage that holds them all (:mod:`.block_seconds`), and passes over the weights on two stages
in an emulator, with a trace. What the engine adds to an action, whatever the stage, says a pipeline of stages that compute next to
nothing. Two processes then tell what messages between them cost (:mod:`.link_profile`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from pipeoptim.bench.block_seconds import SKIP, BlockSeconds, traced_blocks
from pipeoptim.bench.kept_bytes import kept_bytes
from pipeoptim.bench.link_profile import LinkMeasurement, measure_link
from pipeoptim.bench.measured_model import MeasuredModel, OptimizerOf
from pipeoptim.engine import Emulator, Trace
from pipeoptim.errors import ConfigError, counted
from pipeoptim.partitioning import Partition, partition
from pipeoptim.partitioning.block_costs import BlockCost
from pipeoptim.partitioning.block_splitter import BlockRun, sliceable
from pipeoptim.simulate.profile import BlockProfile, LinkProfile, OptimizerProfile, PassCost, Profile
from pipeoptim.train.machine import machine

PASSES = ("naive", "pipeoptim", "pipedream")
"""Methods that tell passes over the weights apart: none beside the step's own, predictions, copies."""


def measure_profile(
    work: MeasuredModel, microbatches: Sequence[int] = (1,), repeats: int = 15, link: LinkMeasurement | None = None
) -> Profile:
    """Measure everything that a profile holds.

    Args:
        work: the model and what trains it.
        microbatches: the numbers M whose micro-batches are measured.
        repeats: mini-batches that a figure is the median of.
        link: what messages cost, where it is known; measured by default.

    Raises:
        ConfigError: an M does not divide the mini-batch, or the model cannot be cut.
    """
    sizes = _sizes(work, microbatches)
    counted = {rows: _counted(work, rows, m) for rows, m in sizes.items()}
    spans = {rows: _of_blocks(work, counted[rows].costs, m, repeats) for rows, m in sizes.items()}
    known, idle = _of_bytes(work, counted), _idle_stages(work.optimizer, repeats)
    link = link or measure_link(repeats)
    engine = idle["naive"][0]
    forwards = [_without(spans[rows].forward, engine.forward) for rows in sizes]
    backwards = [_without(spans[rows].backward, engine.backward) for rows in sizes]
    blocks = tuple(
        replace(block, forward=forward, backward=backward)
        for block, forward, backward in zip(
            known.blocks, zip(*forwards, strict=True), zip(*backwards, strict=True), strict=True
        )
    )
    largest, m = list(sizes.items())[-1]
    return replace(
        known,
        blocks=blocks,
        optimizer=_with_passes(known.optimizer, work, counted[largest].costs, m, repeats, idle),
        link=LinkProfile(link.latency, link.bandwidth, link.handling),
        action=_actions(engine, link),
        spread=spans[largest].spread,
    )


def measured_bytes(work: MeasuredModel, microbatches: Sequence[int] = (1,)) -> Profile:
    """The bytes of a profile; nothing in it takes time.

    Raises:
        ConfigError: an M does not divide the mini-batch, or the model cannot be cut.
    """
    return _of_bytes(work, {rows: _counted(work, rows, m) for rows, m in _sizes(work, microbatches).items()})


class _Counted(NamedTuple):
    """What was found of the blocks for one size of micro-batch: ``kept`` as :func:`kept_bytes` returns it."""

    m: int
    costs: list[BlockCost]
    kept: list[tuple[int, int]]


def _counted(work: MeasuredModel, rows: int, m: int) -> _Counted:
    costs = partition(work.model, 1, work.args, work.kwargs, how=work.how, layers=work.layers, microbatches=m).costs
    args, kwargs, target = tree_map_only(Tensor, lambda t: t[:rows] if t.dim() else t, (work.args, work.kwargs, work.target))

    def share(output: Any, wanted: Any) -> Any:  # of the mini-batch's loss, as the engine starts a backward from it
        loss = work.loss_fn(output, wanted)
        return loss if m == 1 else loss / m

    return _Counted(m, costs, kept_bytes(list(_cut(work, costs, len(costs)).stages), args, kwargs, share, target))


def _of_bytes(work: MeasuredModel, counted: Mapping[int, _Counted]) -> Profile:
    none, free, blocks = (0.0,) * len(counted), PassCost(0.0, 0.0), []
    for k, cost in enumerate(list(counted.values())[-1].costs):
        sent = tuple(one.costs[k].output_bytes / one.m for one in counted.values())
        saved, shared = zip(*(one.kept[k] for one in counted.values()), strict=True)
        blocks.append(BlockProfile(cost.name, none, none, sent, sent, saved, shared, cost.weight_bytes))
    return Profile(
        model=work.name,
        synthetic=False,
        batch_rows=work.rows,
        rows=tuple(counted),
        blocks=tuple(blocks),
        optimizer=OptimizerProfile(_name(work.optimizer), free, free, free, _state_bytes(work)),
        link=LinkProfile(0.0, None),
        made=machine(),
    )


def _sizes(work: MeasuredModel, microbatches: Sequence[int]) -> dict[int, int]:
    """M by rows of its micro-batch, ascending."""
    return dict(sorted({_rows(work, m): m for m in microbatches}.items()))


def _rows(work: MeasuredModel, m: int) -> int:
    if m < 1 or work.rows % m:
        raise ConfigError(f"microbatches is {m}, must divide the mini-batch of {counted(work.rows, 'row')}")
    return work.rows // m


def _of_blocks(work: MeasuredModel, costs: list[BlockCost], m: int, repeats: int) -> BlockSeconds:
    """In one stage that holds all of them; ``costs`` of the blocks are known and not measured again."""
    stage: Any = _cut(work, costs, 1).stages[0]
    if sliceable(stage) and len(stage) == len(costs):  # as po.partition sees the blocks of a container
        return traced_blocks(stage, [stage[n] for n in range(len(costs))], work, m, repeats)
    single = _cut(work, costs, len(costs)).stages
    return traced_blocks(BlockRun({str(n): block for n, block in enumerate(single)}), single, work, m, repeats)


def _cut(work: MeasuredModel, costs: list[BlockCost], depth: int, pins: Sequence[int] = ()) -> Partition:
    """A copy of the model in ``depth`` stages."""
    model = copy.deepcopy(work.model)
    return partition(model, depth, work.args, work.kwargs, how=work.how, layers=work.layers, costs=costs, pins=pins)


def _without(seconds: Sequence[float], engine: float) -> list[float]:
    """``seconds`` of the blocks, less what the engine adds to the action of the stage that holds them all."""
    total = sum(seconds)
    return [max(0.0, 1 - engine / total) * own if total else 0.0 for own in seconds]


def _with_passes(
    known: OptimizerProfile,
    work: MeasuredModel,
    costs: list[BlockCost],
    m: int,
    repeats: int,
    idle: Mapping[str, list[StageSpans]],
) -> OptimizerProfile:
    """``known`` with the passes over the weights, measured on two stages, each with about half of the weights."""
    weights = [cost.weight_bytes for cost in costs]
    middle = next((n for n, done in enumerate(accumulate(weights), start=1) if 2 * done >= sum(weights)), 1)
    pins = [min(middle, len(costs) - 1)] if len(costs) > 1 else []
    held = [sum(weights[: pins[0]]), sum(weights[pins[0] :])] if pins else [sum(weights)]
    found = {name: _trained(_cut(work, costs, len(pins) + 1, pins), work, name, m, repeats) for name in PASSES}
    step = _pass([one.update for one in found["naive"]], held, idle["naive"][0].update)
    rule_step = _pass([found["pipeoptim"][-1].update], held[-1:], idle["pipeoptim"][-1].update)

    def beyond(name: str, step: PassCost) -> PassCost:
        """What stages take for it beside a step; the last one neither predicts nor copies."""
        more = [max(0.0, s.update + s.predict - step.seconds(n)) for s, n in zip(found[name][:-1], held[:-1], strict=True)]
        return _pass(more, held[:-1], max(0.0, idle[name][0].update + idle[name][0].predict - step.fixed))

    return replace(
        known, step=step, rule_step=rule_step, predict=beyond("pipeoptim", rule_step), copy=beyond("pipedream", step)
    )


@dataclass(frozen=True)
class StageSpans:
    """Median seconds of a stage: F and B of a micro-batch, U and predictions of a mini-batch."""

    forward: float
    backward: float
    update: float
    predict: float


def _trained(stages: Any, work: MeasuredModel, method: str, m: int, repeats: int) -> list[StageSpans]:
    """What the stages of an emulator take in the steady state."""
    depth = len(getattr(stages, "stages", stages))
    skip = depth + SKIP
    trace = Trace(steps=repeats, skip=skip)
    pipe = Emulator(stages, work.optimizer, work.loss_fn, method, m, trace=trace)
    for _ in range(skip + repeats + depth):
        pipe.step(*work.args, target=work.target, **work.kwargs)
    pipe.drain()
    return [_spans(trace._rows[k].to_json()["spans"], m) for k in range(depth)]


def _spans(spans: list[list[Any]], m: int) -> StageSpans:
    seconds: dict[str, dict[int, float]] = {}
    for what, number, begin, end, *_ in spans:
        n = number if what == "U" else number // m
        own = seconds.setdefault(what, {})
        own[n] = own.get(n, 0.0) + (end - begin) * 1e-9
    # The first and the last mini-batch may be cut off.
    middle = {what: median(list(own.values())[1:-1] or own.values()) for what, own in seconds.items()}
    return StageSpans(middle["F"] / m, middle["B"] / m, middle["U"], middle.get("predict", 0.0))


class _Idle(nn.Module):
    """A stage that computes next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def _idle_stages(optimizer: OptimizerOf, repeats: int) -> dict[str, list[StageSpans]]:
    """What the engine takes for a stage that computes next to nothing, under each method."""
    x = torch.ones(1, 1)
    work = MeasuredModel("idle", nn.Identity(), (x,), 1, optimizer, nn.functional.mse_loss, x)
    return {name: _trained([_Idle() for _ in range(3)], work, name, 1, 10 * repeats) for name in PASSES}


def _pass(seconds: Sequence[float], weight_bytes: Sequence[float], fixed: float) -> PassCost:
    """``fixed`` per call, and the rest by bytes."""
    total = sum(weight_bytes)
    return PassCost(fixed, max(0.0, sum(seconds) - fixed * len(seconds)) / total if total else 0.0)


def _actions(idle: StageSpans, link: LinkMeasurement) -> dict[str, float]:
    """What the engine adds to each action in a process of its own; U's is in the fixed part of a step."""
    beside = max(0.0, link.per_microbatch - idle.forward - idle.backward) / 2
    return {"F": idle.forward + beside, "B": idle.backward + beside, "U": max(0.0, link.per_minibatch - idle.update)}


def _state_bytes(work: MeasuredModel) -> float:
    """Bytes of the optimizer's state per byte of weights, after a step."""
    model = copy.deepcopy(work.model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        return 0.0
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer = work.optimizer(parameters)
    optimizer.step()
    state = sum(t.nbytes for own in optimizer.state.values() for t in own.values() if isinstance(t, Tensor) and t.dim())
    return state / sum(p.nbytes for p in model.parameters())


def _name(optimizer: OptimizerOf) -> str:
    return type(optimizer([nn.Parameter(torch.ones(1))])).__name__
