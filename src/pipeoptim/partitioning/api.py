"""``po.partition``: from a model to stages, with the costs they were chosen by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from math import inf
from typing import Any, Protocol

from torch import nn
from torch.distributed import ProcessGroup

from pipeoptim.engine.stage.origin import StageOrigin, note_cut_model, note_origins
from pipeoptim.errors import ConfigError, counted
from pipeoptim.methods import Method, get_method
from pipeoptim.partitioning.argument_types import check_types
from pipeoptim.partitioning.block_costs import BlockCost
from pipeoptim.partitioning.block_splitter import BlockSplitter, sliceable
from pipeoptim.partitioning.cut_plan import CutRequest, choose_cut
from pipeoptim.partitioning.layer_splitter import LayerSplitter
from pipeoptim.partitioning.model_files import model_files
from pipeoptim.partitioning.parameter_places import find_parameter_places, without_sharing
from pipeoptim.partitioning.result import Partition
from pipeoptim.partitioning.shared_measurement import measured_by_first
from pipeoptim.partitioning.shared_weights import BlockWeights, shared_weights
from pipeoptim.schedule import Slack, read_slack

HOW = ("auto", "blocks", "layers", "trace")

_MOST_ROWS = 2**31 - 1


class ModelSplitter(Protocol):
    """A model seen as a row of blocks."""

    names: list[str]
    measurable: bool

    def may_cut(self, c: int) -> bool: ...
    def costs(self) -> list[BlockCost]: ...
    def weights(self) -> list[BlockWeights]: ...
    def stages(self, ranges: Sequence[tuple[int, int]]) -> list[nn.Module]: ...
    def check(self, stages: Sequence[nn.Module]) -> None: ...


def partition(
    model: nn.Module | Sequence[nn.Module],
    num_stages: int | None = None,
    sample_args: tuple[Any, ...] = (),
    sample_kwargs: Mapping[str, Any] | None = None,
    *,
    how: str = "auto",
    layers: str | Sequence[str] | None = None,
    costs: Sequence[BlockCost] | None = None,
    speeds: Sequence[float] | None = None,
    memory: Sequence[int] | None = None,
    devices: int | None = None,
    bandwidth: float | None = None,
    pins: Sequence[int | str] = (),
    group: ProcessGroup | None = None,
    method: str | Method = "pipeoptim",
    microbatches: int = 1,
    slack: Slack | str | Sequence[float] = 0.0,
    refresh: int | None = None,
) -> Partition:
    """Cut ``model`` into ``num_stages`` contiguous stages so that the slowest one is as fast as possible.

    The time of stage k is the sum of its blocks' seconds over ``speeds[k]``. Its memory is what ``method`` needs there: copies
    of the weights, one gradient, the activations of the micro-batches in flight, and for weights that other stages use as well the
    sums of gradients on their way. The cut is exact, not a heuristic.

    With ``devices`` a stage may have several, which share its mini-batches and add up their gradients; see
    :func:`~pipeoptim.partitioning.best_replicas`.

    Args:
        model: an ``nn.Sequential`` (or a container with length and slices), a list of blocks that run one after the other, or
            an ordinary model with layers somewhere inside it, such as those of Hugging Face Transformers.
        num_stages: depth D. With ``devices`` it may be left out: the fastest one is taken.
        sample_args, sample_kwargs: one mini-batch as the model takes it, to see what the model does, and of which one micro-batch
            after another is measured. For blocks it is not needed when ``costs`` are given or all cuts are pinned. What all
            micro-batches get whole is wrapped in ``pipeoptim.Whole``.
        how: ``"blocks"``: the model is a row of blocks. ``"layers"``: each stage runs its part of the model's own forward.
            ``"trace"``: ``torch.export`` cuts the graph of operations. ``"auto"``: blocks where the model has them, else layers,
            else (too few places between layers can be cut) the trace.
        layers: names of the lists of layers, or of single modules, behind which the model may be cut; found by itself.
        costs: of the blocks, from :func:`~pipeoptim.partitioning.profile` or your own.
        speeds: of the devices, relative to the one measured; all 1 by default.
        memory: bytes of the device of each stage; unlimited by default. With ``devices`` a single number, in a list.
        devices: how many equal devices to use; by default one per stage.
        bandwidth: bytes per second between devices; a stage is then at least as slow as sending what it returns and receiving
            its gradient. Unlimited by default; needed with ``devices``.
        pins: numbers or names of blocks with which a stage must begin.
        group: processes that all call this with the same model, usually ``torch.distributed.group.WORLD``. The first of them measures,
            and all cut at the same places. Without it each process measures by itself, and chance may make them cut differently;
            not needed when ``costs`` are given or all cuts are pinned.
        method: what will train, for the memory.
        microbatches: M of a mini-batch.
        slack: more micro-batches in flight, as for :class:`~pipeoptim.Schedule`; they cost activations.
        refresh: of predictions from the mini-batch in progress, as for :class:`~pipeoptim.Schedule`; where ``method`` keeps predictions
            until the backward, each costs a copy of the weights. None for other predictions.

    Raises:
        StageFailure: the first process of ``group`` could not measure.
        ConfigError: more stages than blocks, lists of the wrong length, no cut fits, or the model cannot be cut like this.

    Example:
        >>> import torch
        >>> blocks = [torch.nn.Linear(64, 64) for _ in range(6)]
        >>> cut = partition(torch.nn.Sequential(*blocks), 3, (torch.ones(8, 64),))
        >>> sum(cut.lengths), len(cut.stages)
        (6, 3)
    """
    chosen = get_method(method)
    if type(microbatches) is not int or microbatches < 1:
        raise ConfigError(f"microbatches is {microbatches!r}, must be an integer of at least 1")
    if microbatches > _MOST_ROWS:
        raise ConfigError(f"microbatches is {microbatches}, and no mini-batch has so many rows; choose a smaller number")
    if refresh is not None and (type(refresh) is not int or refresh < 1):
        raise ConfigError(f"refresh is {refresh!r}, must be an integer of at least 1, or None")
    for what, number in (("num_stages", num_stages), ("devices", devices)):
        if number is not None and type(number) is not int:
            raise ConfigError(f"{what} is {number!r}, must be an integer")
    check_types(model, sample_kwargs, layers, costs, speeds, memory, bandwidth, group)
    how, splitter = _splitter(model, sample_args, dict(sample_kwargs or {}), how, layers, microbatches, num_stages)
    blocks = len(splitter.names)
    numbers = _numbers(pins, splitter.names)
    _check(blocks, num_stages, speeds, memory, numbers, devices, bandwidth)
    if costs is None:
        pinned = num_stages is not None and len(numbers) == num_stages - 1 and memory is None
        measure = partial(_unmeasured, splitter) if pinned and not splitter.measurable else splitter.costs
        costs = measure() if group is None else measured_by_first(measure, group)
    if len(costs) != blocks:
        raise ConfigError(f"costs has {len(costs)} entries for {blocks} blocks; give one per block")
    allowed = {c for c in range(blocks - 1) if splitter.may_cut(c)}
    request = CutRequest(
        num_stages, chosen, microbatches, speeds, memory, devices, bandwidth, numbers, allowed, read_slack(slack), refresh
    )
    plan = choose_cut(list(costs), request, shared_weights(splitter.weights()))
    shared = splitter.stages(plan.ranges)
    whole = model if isinstance(model, nn.Module) else nn.ModuleList(model)
    names, tied = find_parameter_places(whole, shared)
    stages = without_sharing(shared)
    splitter.check(stages)
    lengths = [end - start for start, end in plan.ranges]
    files, depth = model_files(whole), len(stages)
    note_origins(stages, [StageOrigin(k, depth, tuple(lengths), names[k], tuple(tied), files) for k in range(depth)])
    note_cut_model(stages, whole)
    return Partition(stages, lengths, list(costs), plan.seconds, plan.memory, names, tied, how, plan.replicas)


def _splitter(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], how: str, layers: Any, m: int, stages: int | None
) -> tuple[str, ModelSplitter]:
    if not isinstance(how, str) or how not in HOW:
        raise ConfigError(f"how is {how!r}, must be one of {', '.join(HOW)}")
    given = isinstance(args, tuple)
    if not given:
        raise ConfigError(f"sample_args is a {type(args).__name__}, must be a tuple of the model's arguments: (x,)")
    auto = how == "auto"
    if auto:
        how = "blocks" if layers is None and (not isinstance(model, nn.Module) or sliceable(model)) else "layers"
    if how == "blocks":
        if layers is not None:
            raise ConfigError(f'layers is {layers!r} with how="blocks", which cuts between all blocks; leave one of them out')
        if isinstance(model, nn.Module) and not sliceable(model):
            raise ConfigError(
                f'how is "blocks" and the model is a {type(model).__name__}, which cannot be sliced; pass an nn.Sequential or '
                'the list of its blocks in the order in which they run, or how="layers"'
            )
        return how, BlockSplitter(model, args, m)
    if not isinstance(model, nn.Module):
        raise ConfigError(f'how is "{how}" and the model is a {type(model).__name__}, must be an nn.Module')
    if not args and not kwargs:
        raise ConfigError(
            f"the model is a {type(model).__name__}, which cannot be sliced, and no sample_args were given; pass one mini-batch, "
            "from which its layers are found, or pass an nn.Sequential or the list of its blocks"
        )
    if how == "layers":
        layered = LayerSplitter(model, args, kwargs, layers, m)
        places = sum(layered.may_cut(c) for c in range(len(layered.names) - 1))
        if not auto or not layered.measurable or places >= (stages or 1) - 1 or len(layered.names) < (stages or 1):
            return how, layered
    from pipeoptim.partitioning.trace_splitter import TraceSplitter  # torch.export is slow to import

    try:
        return "trace", TraceSplitter(model, args, kwargs, layers, m)
    except ConfigError as error:
        if not auto:
            raise
        reason = str(error).partition("; partition with how=")[0]
        raise ConfigError(
            f"the {type(model).__name__} cannot be cut into {counted(stages or 1, 'stage')} between its layers, since "
            f"more than a layer's own output is used later, and not by a trace either: {reason}; put what is done around a layer into "
            "a module with it, so that what this returns is all that is used after it, or pass the list of blocks"
        ) from None


def _unmeasured(splitter: ModelSplitter) -> list[BlockCost]:
    """Costs where nothing is to be chosen: bytes of the weights, no seconds."""
    pairs = zip(splitter.names, splitter.weights(), strict=True)
    return [BlockCost(name, 0.0, 0.0, 0, 0, sum(own.values())) for name, own in pairs]


def _numbers(pins: Sequence[int | str], names: Sequence[str]) -> set[int]:
    if isinstance(pins, str) or not isinstance(pins, Iterable):
        raise ConfigError(f"pins is {pins!r}, must be a list of numbers or names of blocks; leave it out for none")
    for pin in pins:
        if not isinstance(pin, str) and type(pin) is not int:
            raise ConfigError(f"pins holds {pin!r}, must be a list of numbers or names of blocks")
    unknown = [pin for pin in pins if isinstance(pin, str) and pin not in names]
    if unknown:
        raise ConfigError(f"pins names {unknown[0]!r}, which is not a block; known: {', '.join(names)}")
    return {list(names).index(pin) if isinstance(pin, str) else pin for pin in pins}


def _check(
    blocks: int,
    stages: int | None,
    speeds: Sequence[float] | None,
    memory: Sequence[int] | None,
    pins: set[int],
    devices: int | None,
    bandwidth: float | None,
) -> None:
    if stages is None and devices is None:
        raise ConfigError("neither num_stages nor devices was given; say how many stages, or how many devices to use")
    if stages is not None and not 1 <= stages <= blocks:
        raise ConfigError(f"num_stages is {stages}, but the model has {blocks} blocks; use 1 .. {blocks}")
    if bandwidth is not None and not bandwidth > 0:
        raise ConfigError(f"bandwidth is {bandwidth}, must be a positive number of bytes per second")
    if devices is not None:
        if devices < (stages or 1):
            raise ConfigError(f"devices is {devices}, must be at least one per stage ({stages or 1})")
        if bandwidth is None:
            raise ConfigError(f"devices is {devices} without bandwidth; say how many bytes per second go between devices")
        if speeds is not None:
            raise ConfigError(f"speeds is {list(speeds)} with devices={devices}, which are taken to be equal; leave one out")
    for what, values, count in (("speeds", speeds, stages), ("memory", memory, stages if devices is None else 1)):
        if values is not None and (len(values) != count or not all(0 < value < inf for value in values)):
            raise ConfigError(
                f"{what} is {list(values)}, must be {count} positive numbers, one per stage"
                if devices is None
                else f"{what} is {list(values)}, must be one positive number, the bytes of each of the equal devices"
            )
    bad = [pin for pin in pins if not 0 < pin < blocks]
    most = (stages or min(devices or 1, blocks)) - 1
    if bad or len(pins) > most:
        raise ConfigError(
            f"pins is {sorted(pins)}, must be at most {most} block numbers from 1 .. {blocks - 1}: where a stage must begin"
        )
