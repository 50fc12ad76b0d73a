"""A profile of a model on this machine, for ``pipeoptim simulate``: measured by the engine itself, every block as a stage of its own.

An emulator with a trace trains the model with one stage per block, so that seconds of F, B and U include what the engine adds to them.
What that is for an action, whatever the stage, says a pipeline of stages that compute next to nothing; a stage of n blocks takes their
sum, and that n - 1 times less. Two processes then tell what messages between them cost (:mod:`.link_profile`).
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from pipeoptim.bench.kept_bytes import kept_bytes
from pipeoptim.bench.link_profile import LinkMeasurement, measure_link
from pipeoptim.engine import Emulator, Trace
from pipeoptim.errors import ConfigError, counted
from pipeoptim.files import read_object
from pipeoptim.partitioning import Partition, partition
from pipeoptim.partitioning.block_costs import BlockCost
from pipeoptim.simulate.profile import BlockProfile, LinkProfile, OptimizerProfile, PassCost, Profile
from pipeoptim.train.machine import machine

OptimizerOf = Callable[[Any], Optimizer]


@dataclass(frozen=True)
class MeasuredModel:
    """What is profiled.

    Attributes:
        name: for the file.
        model: is copied before it is trained.
        args, kwargs: a mini-batch.
        rows: of it.
        loss_fn, target: as for training; a sum over what the model returns where there is none.
        optimizer: makes one from parameters.
        how, layers: as for :func:`~pipeoptim.partition`.
    """

    name: str
    model: nn.Module
    args: tuple[Any, ...]
    rows: int
    optimizer: OptimizerOf
    loss_fn: Callable[..., Any]
    target: Any = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    how: str = "auto"
    layers: Sequence[str] | None = None


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
    spans = {rows: _trained(work, counted[rows].costs, "pipeoptim", m, repeats) for rows, m in sizes.items()}
    largest, m = list(sizes.items())[-1]
    plain, stashed = (_trained(work, counted[largest].costs, name, m, repeats) for name in ("naive", "pipedream"))
    known, predicted, idle = _of_bytes(work, counted), spans[largest], _idle_stages(work.optimizer, repeats)
    link = link or measure_link(repeats)
    blocks = tuple(
        replace(
            block,
            forward=tuple(max(0.0, spans[rows][k].forward - idle["pipeoptim"].forward) for rows in sizes),
            backward=tuple(max(0.0, spans[rows][k].backward - idle["pipeoptim"].backward) for rows in sizes),
        )
        for k, block in enumerate(known.blocks)
    )
    weights = [block.weight_bytes for block in blocks]
    step = _pass([s.update for s in plain], weights, idle["naive"].update)
    predict = _pass(
        [max(0.0, a.update + a.predict - b.update) for a, b in zip(predicted[:-1], plain[:-1], strict=True)],
        weights[:-1],
        max(0.0, idle["pipeoptim"].update + idle["pipeoptim"].predict - idle["naive"].update),
    )
    copied = _pass(
        [max(0.0, a.update - b.update) for a, b in zip(stashed[:-1], plain[:-1], strict=True)],
        weights[:-1],
        max(0.0, idle["pipedream"].update - idle["naive"].update),
    )
    return replace(
        known,
        blocks=blocks,
        optimizer=replace(known.optimizer, step=step, predict=predict, copy=copied),
        link=LinkProfile(link.latency, link.bandwidth, link.handling),
        action=_actions(idle["naive"], link),
        spread=median(s.spread for s in predicted),
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

    return _Counted(m, costs, kept_bytes(list(_single_blocks(work, costs).stages), args, kwargs, share, target))


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


@dataclass(frozen=True)
class StageSpans:
    """Median seconds of a stage: F and B of a micro-batch, U and predictions of a mini-batch; ``spread`` of F and B, as a share."""

    forward: float
    backward: float
    update: float
    predict: float
    spread: float


def _trained(work: MeasuredModel, costs: list[BlockCost], method: str, m: int, repeats: int) -> list[StageSpans]:
    """Of every block as a stage, in training with ``method``; ``costs`` of the blocks are known and not measured again."""
    cut = _single_blocks(work, costs)
    return traced(cut, work.optimizer, work.loss_fn, method, m, work.args, work.kwargs, work.target, repeats)


def _single_blocks(work: MeasuredModel, costs: list[BlockCost]) -> Partition:
    """A copy of the model with every block as a stage."""
    model = copy.deepcopy(work.model)
    return partition(model, len(costs), work.args, work.kwargs, how=work.how, layers=work.layers, costs=costs)


def traced(
    stages: Any,
    optimizer: OptimizerOf,
    loss_fn: Callable[..., Any],
    method: str,
    m: int,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    target: Any,
    repeats: int,
) -> list[StageSpans]:
    """What the stages of an emulator take in the steady state."""
    depth = len(getattr(stages, "stages", stages))
    skip = depth + 2
    trace = Trace(steps=repeats, skip=skip)
    pipe = Emulator(stages, optimizer, loss_fn, method, m, trace=trace)
    for _ in range(skip + repeats + depth):
        pipe.step(*args, target=target, **kwargs)
    pipe.drain()
    with tempfile.TemporaryDirectory(prefix="pipeoptim-profile-") as folder:
        return [_spans(read_object(path)["spans"], m) for path in trace.save(folder)]


def _spans(spans: list[list[Any]], m: int) -> StageSpans:
    seconds: dict[str, dict[int, float]] = {}
    for what, number, begin, end, *_ in spans:
        n = number if what == "U" else number // m
        own = seconds.setdefault(what, {})
        own[n] = own.get(n, 0.0) + (end - begin) * 1e-9
    whole = {what: sorted(list(own.values())[1:-1] or own.values()) for what, own in seconds.items()}  # the ends may be cut off
    middle = {what: median(values) for what, values in whole.items()}
    # Of the same turn: with many stages none has F and B of the same mini-batch in the trace.
    both = sorted(f + b for f, b in zip(seconds["F"].values(), seconds["B"].values(), strict=False))
    spread = (both[round(0.84 * (len(both) - 1))] - both[round(0.16 * (len(both) - 1))]) / 2 / median(both)
    return StageSpans(middle["F"] / m, middle["B"] / m, middle["U"], middle.get("predict", 0.0), spread)


class _Idle(nn.Module):
    """A stage that computes next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def _idle_stages(optimizer: OptimizerOf, repeats: int) -> dict[str, StageSpans]:
    """What the engine takes for a stage that computes next to nothing, under each method."""
    x = torch.ones(1, 1)
    return {
        method: traced([_Idle() for _ in range(3)], optimizer, nn.functional.mse_loss, method, 1, (x,), {}, x, 10 * repeats)[0]
        for method in ("naive", "pipeoptim", "pipedream")
    }


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
