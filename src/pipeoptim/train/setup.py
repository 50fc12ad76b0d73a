"""From a configuration to the setup of a run: data, stages, and the functions that make optimizers and schedulers.

Every process builds the whole model from the same seed and keeps its own stage, so the initial weights are the same for
any number of stages and for both engines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pipeoptim.config import TrainConfig, read_cut
from pipeoptim.engine.stage.tied import Tied
from pipeoptim.engine.stage.tied_weights import read_tied
from pipeoptim.errors import ConfigError
from pipeoptim.methods import get_method
from pipeoptim.options import options_of_run
from pipeoptim.partitioning.block_splitter import sliceable
from pipeoptim.partitioning.parameter_places import untie
from pipeoptim.partitioning.result import Partition
from pipeoptim.train import lr_schedules, optimizers, stage_rates
from pipeoptim.train.callbacks import Callback, make_callbacks
from pipeoptim.train.checks import program
from pipeoptim.train.cut import cut, cut_between_layers
from pipeoptim.train.events import RunEvents
from pipeoptim.train.parameter_groups import check_all_used
from pipeoptim.train.ramps import SizePlan, parts_of
from pipeoptim.train.recomputed import checkpoint_blocks
from pipeoptim.train.stagewise import StagewiseModel, without_values
from pipeoptim.train.targets import build


class Task(Protocol):
    """What a run needs of a data set. A batch is a function of (seed, step) alone: processes agree on it without communication."""

    def train_batch(self, step: int, batch_size: int) -> tuple[Tensor, Tensor]: ...
    def validation_batches(self, batch_size: int) -> Iterable[tuple[Tensor, Tensor]]: ...
    def loss(self, output: Tensor, target: Tensor, /) -> Tensor: ...
    def metrics(self, output: Tensor, target: Tensor, /) -> dict[str, float]: ...
    def describe(self) -> str: ...


@dataclass(frozen=True)
class RunSetup:
    """Everything that an engine is built from; ``replica`` is the one of the run's replicas that trains in this process, ``stagewise``
    what fills its stages, where they are still without values,
    ``events`` whom its callbacks listen to."""

    config: TrainConfig
    task: Task
    stages: Sequence[nn.Module]
    optimizer: optimizers.Factory
    scheduler: Callable[[Optimizer], LRScheduler]
    validation: Sequence[tuple[Tensor, Tensor]]
    tied: Sequence[Tied] = ()
    replica: int = 0
    stagewise: StagewiseModel | None = None
    events: RunEvents = field(default_factory=RunEvents)

    @cached_property
    def sizes(self) -> SizePlan:
        """How large each mini-batch is, and how many micro-batches it has."""
        return SizePlan(self.config)

    def local_to(self, replica: int, stages: Sequence[int]) -> RunSetup:
        """The setup of some stages of a replica, with their weights and without those of the others."""
        if self.stagewise is not None:
            with seeded(self.config.seed):
                self.stagewise.fill([self.stages[k] for k in stages])
        mine = [stage if k in stages else nn.Identity() for k, stage in enumerate(self.stages)]
        return replace(self, stages=mine, replica=replica)

    def all_here(self) -> RunSetup:
        """The setup of all stages, with their weights."""
        return self.local_to(0, range(len(self.stages)))

    def replica_rows(self, batch: Tensor, m: int) -> Tensor:
        """This replica's part of a mini-batch: of each of its ``m`` micro-batches, so that together the replicas train on the same ones
        as one."""
        replicas = self.config.replicas
        if replicas == 1:
            return batch
        slices = batch.chunk(m) if len(batch) % (replicas * m) == 0 else (batch,)
        return torch.cat([rows.chunk(replicas)[self.replica] for rows in slices])


def build_setup(config: TrainConfig, callbacks: Sequence[Callback] = ()) -> RunSetup:
    """Data and the model cut into stages, all checked.

    Args:
        callbacks: further ones than those that ``config`` names.

    Raises:
        ConfigError: a component is unknown or refuses its options, or the model cannot be cut.
    """
    at_first = program(parts_of(config)[0])
    optimizer = stage_rates.with_stage_rates(config, at_first, optimizers.factory(config.optimizer, config.stages))
    task = read_data(config)
    config = with_steps(config, task)
    scheduler = stage_rates.keeping_rates(config, lr_schedules.factory(config.lr_schedule, config.steps))
    made = build_model(config)
    stagewise = made if isinstance(made, StagewiseModel) else None
    model = made.skeleton if isinstance(made, StagewiseModel) else made
    _check_sizes(config, task, {} if stagewise is None else stagewise.sizes)
    stages, tied = _cut(model, config, task)
    stage_rates.check_ties(config, at_first, tied)
    read_tied(
        tied,
        (),
        at_first,
        get_method(config.method),
        options_of_run(config)["clip"],
        scaled=False,  # copies of a weight that several stages use would diverge under some settings
    )
    if config.recompute and not sliceable(model):
        raise ConfigError(
            f"recompute is {config.recompute!r}, but the {type(model).__name__} has no blocks to checkpoint; let the model do so itself "
            "(gradient_checkpointing_enable), or make it an nn.Sequential"
        )
    if config.recompute:
        for stage in stages:
            checkpoint_blocks(stage)
    events = RunEvents([*make_callbacks(config.callbacks), *callbacks])
    validation = _validation_batches(task, config)
    return RunSetup(config, task, stages, optimizer, scheduler, validation, tied, stagewise=stagewise, events=events)


def build_model(config: TrainConfig) -> nn.Module | StagewiseModel:
    """The model of ``config``.

    Raises:
        ConfigError: it is unknown, refuses its options, or is no module.
    """
    with seeded(config.seed):
        model = build("model", config.model)
    if not isinstance(model, nn.Module | StagewiseModel):
        raise ConfigError(f"model {config.model.target} returned a {type(model).__name__}, must return an nn.Module")
    return model


def _cut(model: nn.Module, config: TrainConfig, task: Task) -> tuple[Sequence[nn.Module], Sequence[Tied]]:
    if sliceable(model):
        return untie(cut(model, config.stages, read_cut(config.cut)))
    found = _between_layers(model, config, task)
    return found.stages, found.tied


def _between_layers(model: nn.Module, config: TrainConfig, task: Task) -> Partition:
    x, _ = task.train_batch(0, config.batch_size)
    rows = max(1, len(x) // (config.microbatches * config.replicas))
    with seeded(config.seed):  # the model is run, to see what it does
        return cut_between_layers(model, config.stages, x[:rows], read_cut(config.cut))


def cut_lengths(config: TrainConfig) -> tuple[int, ...]:
    """How many blocks each stage of a run has."""
    made = build_model(config)
    model = made.skeleton if isinstance(made, StagewiseModel) else made
    if sliceable(model):
        return tuple(len(stage) for stage in cut(model, config.stages, read_cut(config.cut)))  # type: ignore[arg-type]
    return tuple(_between_layers(model, config, read_data(config)).lengths)


def read_data(config: TrainConfig) -> Task:
    """The task of ``config``.

    Raises:
        ConfigError: it is unknown, refuses its options, or its files are not there.
    """
    task: Task = build("data", config.data, seed=config.seed, model_options=config.model.options)
    return task


def with_steps(config: TrainConfig, task: Task | None = None) -> TrainConfig:
    """``config`` with its epochs counted in steps, ``steps = epochs * task.steps_per_epoch(batch_size)``, and ``epochs`` 0.

    Unchanged where it has steps. A run does this itself; call it to know ``config.steps`` before the run.

    Args:
        task: its data; read where None and needed.

    Raises:
        ConfigError: as :func:`read_data`, or the data has no ``steps_per_epoch``.
    """
    if config.steps:
        return replace(config, epochs=0)
    task = task or read_data(config)
    count = getattr(task, "steps_per_epoch", None)
    if count is None:
        raise ConfigError(
            f"epochs is {config.epochs}, but the data ({task.describe()}) has no steps_per_epoch(batch_size); set steps"
        )
    return replace(config, steps=config.epochs * count(config.batch_size), epochs=0)


def _check_sizes(config: TrainConfig, task: Task, sizes: Mapping[str, int]) -> None:
    """A vocabulary or set of classes larger than the model's might show only late, as an index error in the middle of a run."""
    for name in ("vocab_size", "classes", "context"):
        has, needed = config.model.options.get(name, sizes.get(name)), getattr(task, name, 0)
        if isinstance(has, int) and has < needed:
            raise ConfigError(
                f"the model's {name} is {has}, but the data ({task.describe()}) has {needed}; raise it in the options of model, or "
                "change the data"
            )


def _validation_batches(task: Task, config: TrainConfig) -> list[tuple[Tensor, Tensor]]:
    """Full batches, spread evenly over the validation set: its parts may differ (files of a text, classes in order).

    A pipeline's buffers have one shape, so a smaller last batch is left out.
    """

    def full() -> Iterator[tuple[Tensor, Tensor]]:
        return (pair for pair in task.validation_batches(config.batch_size) if len(pair[0]) == config.batch_size)

    count = sum(1 for _ in full())
    if not count:
        raise ConfigError(
            f"batch_size {config.batch_size} is more than the validation set of {task.describe()}; lower batch_size"
        )
    wanted = min(count, config.eval_batches)
    chosen = {i * count // wanted for i in range(wanted)}
    return [pair for i, pair in enumerate(full()) if i in chosen]


def probe_setup(setup: RunSetup) -> None:
    """One micro-batch through the whole model as in training, so that a mismatch is reported before anything is written.

    Raises:
        ConfigError: model and data do not fit, the loss is not a scalar or has no gradient, or an optimizer or schedule
            refuses its options.
    """
    sizes = setup.sizes.at(0)
    x, y = setup.task.train_batch(0, sizes.batch_size)
    size = max(1, len(x) // (sizes.microbatches * setup.config.replicas))
    check_all_used(setup.stages, setup.config.optimizer.options.get("groups", ()))
    for k, stage in enumerate(setup.stages):
        setup.scheduler(setup.optimizer(stage, k))
    if any(map(without_values, setup.stages)):  # whose forms have run when they were cut
        return
    try:
        loss = _probe_forward(setup, x[:size].clone(), y[:size])
    except ConfigError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"model {setup.config.model.target} does not fit micro-batches of {size} of the data ({setup.task.describe()}): {reason}; "
            "change one of them, or batch size and micro-batches"
        ) from error
    if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.dim() != 0:
        shape = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ConfigError(f"the loss of {setup.config.data.target} is {shape}, must be a scalar tensor; take its mean")
    if not loss.requires_grad:
        raise ConfigError(
            f"the loss of {setup.config.data.target} has no gradient, so nothing would be trained; compute it from the output "
            "without .detach() or .item(), and leave parameters of the last stage trainable"
        )


def _probe_forward(setup: RunSetup, x: Tensor, y: Tensor) -> Any:
    buffers = [(b, b.clone()) for stage in setup.stages for b in stage.buffers()]  # statistics of BatchNorm
    try:
        with seeded(setup.config.seed):
            value: Any = x
            for stage in setup.stages:
                value = stage(*value) if isinstance(value, tuple) else stage(value)
            return setup.task.loss(value, y)
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's CPU random state set to ``seed``, restored at the end."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """torch's number of CPU threads, restored at the end. It is part of the result: sums depend on how they are split."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
