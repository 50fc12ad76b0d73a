"""A whole pipeline in one process: the reference for pipelines in several processes, and the tool to compare methods with."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol, Unpack, runtime_checkable

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pipeoptim.engine import traced
from pipeoptim.engine.automatic import settle_options
from pipeoptim.engine.microbatches import MicroBatch, StageKwargs
from pipeoptim.engine.per_stage import one_each, scalers_of
from pipeoptim.engine.pipeline import Pipeline
from pipeoptim.engine.processes.gradient_exchange import LocalGradientSum
from pipeoptim.engine.processes.norm_exchange import LocalNormExchange
from pipeoptim.engine.runner import CountedLoss, StageRunner
from pipeoptim.engine.stage.checks import check_optimizer
from pipeoptim.engine.stage.tied import Tied
from pipeoptim.engine.stage.tied_weights import (
    TieOnStage,
    carried_ties,
    check_tied_equal,
    describe_tied,
    read_tied,
)
from pipeoptim.engine.stage.worker import LossFn
from pipeoptim.engine.transport.memory_link import memory_links
from pipeoptim.errors import ConfigError, PipeOptimError
from pipeoptim.methods import Method
from pipeoptim.options import OPTIONS, OptionKeywords, PipelineOptions, takes_options
from pipeoptim.schedule import AUTO, Action, ActionKind

OptimizerMaker = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerMaker = Callable[[Optimizer], LRScheduler]


@runtime_checkable
class CutModel(Protocol):
    """A model in stages, such as a :class:`~pipeoptim.Partition`."""

    @property
    def stages(self) -> Sequence[nn.Module]: ...


@takes_options(OPTIONS)
class Emulator(Pipeline):
    """Trains ``stages`` in this process exactly as one process per stage would.

    Every stage follows its own action program and acts when what it needs of its neighbours has arrived; nothing is flushed
    between mini-batches unless the method says so. On the CPU, weights are equal bit for bit to those of
    :class:`~pipeoptim.Schedule` with the same seeds, step after step.

    Args:
        stages: D modules that run one after the other, or a :class:`~pipeoptim.Partition`. A tuple output becomes the next stage's
            positional arguments.
        optimizers: one per stage, or a callable that makes one from parameters. Stepped by the pipeline, never by you.
        loss_fn: ``loss_fn(output, target) -> scalar``, mean over the micro-batch; or ``{"loss": scalar, name: part, ...}``, or
            ``(scalar, {name: part})``: the parts are reported by :attr:`loss_parts`.
        method: a name in :data:`pipeoptim.METHODS`, a :class:`~pipeoptim.Method` of your own, or "auto".
        microbatches: M slices per mini-batch and update; 1 is the default of the asynchronous methods.
        schedulers: one learning-rate scheduler per stage, or a callable that makes one; advanced once per update.
        processes: act as P processes with D/P stages each, stage k on process ``k mod P``, in the interleaved order
            (see :class:`~pipeoptim.InterleavedSchedule`); by default one stage per process.
        options: see :class:`~pipeoptim.PipelineOptions`.

    Raises:
        ConfigError: no stages, wrong number of optimizers, unknown method, or arguments that do not fit together.

    Example:
        >>> import torch, pipeoptim as po
        >>> stages = [torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)]
        >>> pipe = po.Emulator(stages, lambda p: torch.optim.SGD(p, lr=0.1), torch.nn.functional.mse_loss)
        >>> losses = [pipe.step(torch.ones(2, 4), target=torch.ones(2, 1)) for _ in range(3)]
        >>> pipe.drain()
        >>> pipe.version(0), pipe.version_gap(0), pipe.version_gap(1)
        (3, 1, 0)
    """

    def __init__(
        self,
        stages: Sequence[nn.Module] | CutModel,
        optimizers: Sequence[Optimizer] | OptimizerMaker,
        loss_fn: LossFn,
        method: str | Method = "pipeoptim",
        microbatches: int = 1,
        *,
        schedulers: Sequence[LRScheduler] | SchedulerMaker | None = None,
        processes: int | None = None,
        **options: Unpack[OptionKeywords],
    ) -> None:
        modules = _checked_modules(stages)
        _refuse_shared(modules)
        # Taken out first: the other options are the same for all stages, a scaler is not.
        scalers = scalers_of(len(modules), options.pop("scaler", None))
        # Made here where a function is given: per stage, from that stage's parameters only.
        chosen = one_each("optimizers", len(modules), optimizers, [list(module.parameters()) for module in modules])
        read = settle_options(
            lambda method: PipelineOptions.read("Emulator", OPTIONS, method, microbatches, options),
            method,
            options.get("prediction"),
            chosen,
            len(modules),
            processes,
        )
        if read.slack == AUTO:
            raise ConfigError(
                "slack is 'auto', which is measured between processes, and an emulator has no links; give the number that they chose "
                "(pipe.slack), or leave slack out"
            )
        super().__init__(read, len(modules), processes)
        self._processes = range(self.program.processes or self.depth)
        rates = one_each("schedulers", self.depth, schedulers, chosen)
        for k, optimizer in enumerate(chosen):
            check_optimizer(optimizer, k)
        # One exchange for all stages; each holds an end of it, as each process does of its own.
        norms = LocalNormExchange(len(modules)) if read.clip is not None and read.clip.exchanges else None
        scaled = any(isinstance(one, GradScaler) and one.is_enabled() for one in scalers)
        carried = carried_ties(dict(enumerate(modules)), self.depth)
        ties = read_tied(read.tied, carried, self.program, self.method, read.clip, scaled)
        exchanges = [LocalGradientSum(tie.holders) for tie in ties]
        # Kept besides the ports, to look whether a message is there before a stage acts.
        self._activations, self._gradients, ports = memory_links(self.depth)
        for k, module in enumerate(modules):
            row = self._trace_row(k, next((p.device for p in module.parameters()), torch.device("cpu")))
            worker = traced.noted_worker(row)(
                module,
                chosen[k],
                self.method,
                self.program,
                k,
                loss_fn,
                scheduler=rates[k],
                options=replace(read, scaler=scalers[k], on_update=self._changes.noted(read.on_update)),
                norms=None if norms is None else norms.end(k),
                ties=[
                    TieOnStage(tie, k, exchange.end(k))
                    for tie, exchange in zip(ties, exchanges, strict=True)
                    if k in tie.holders
                ],
            )
            self._runners[k] = StageRunner(worker, self._splitter, ports[k])
        for tie in ties:
            self._equalize_copies(tie)

    def step(
        self,
        *args: Any,
        target: Any = None,
        losses: list[Tensor] | None = None,
        stage_kwargs: StageKwargs | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Train on one mini-batch and return its loss (mean over micro-batches, detached).

        Args:
            args, kwargs: input of stage 0.
            target: given to ``loss_fn`` with the output of the last stage.
            losses: a list that is filled with the loss of each micro-batch, as torch's schedules do.
            stage_kwargs: keyword arguments of any stage: ``{2: {"mask": mask}}``.

        Raises:
            ConfigError: the batch cannot be split into M equal micro-batches, or the loss is not a scalar.
        """
        loss = super().step(*args, target=target, losses=losses, stage_kwargs=stage_kwargs, **kwargs)
        assert loss is not None
        return loss

    def eval_step(
        self, *args: Any, target: Any = None, drain: bool = True, stage_kwargs: StageKwargs | None = None, **kwargs: Any
    ) -> Tensor:
        """As :meth:`Pipeline.eval_step <pipeoptim.engine.pipeline.Pipeline.eval_step>`; the loss is always here."""
        loss = super().eval_step(*args, target=target, drain=drain, stage_kwargs=stage_kwargs, **kwargs)
        assert loss is not None
        return loss

    def _run_actions(
        self, todo: list[list[tuple[int, Action]]], micro_batches: list[MicroBatch], losses: list[CountedLoss]
    ) -> None:
        """Let each process act as far as it can, in turn, until all are done. With "gpipe", two stages and two micro-batches::

            turn 1   stage 0:  F0 F1                  its B0 has no gradient yet
                               | activations
                               v
                     stage 1:  F0 F1 B0 B1 U0
                               | gradients
                               v
            turn 2   stage 0:  B0 B1 U0

        The order of turns changes no number: links keep the order of messages, and each stage has random numbers of its own.
        """
        # One per process, since interleaved stages of one process share one order.
        queues = [deque(actions) for actions in todo]
        while any(queues):
            before = sum(map(len, queues))
            for queue in queues:
                while queue and self._can_run(*queue[0]):
                    k, action = queue.popleft()
                    self._runners[k].run(action, micro_batches, losses)
            # Nobody has moved: the program itself is wrong, for nothing else can arrive.
            if sum(map(len, queues)) == before:
                waiting = [f"{action} of stage {k}" for k, action in (queue[0] for queue in queues if queue)]
                raise PipeOptimError(f"the program deadlocks: {', '.join(waiting)} wait for one another")

    def _can_run(self, k: int, action: Action) -> bool:
        """Whether what ``action`` needs of other stages has arrived: they act in this same thread, so nothing may wait for them."""
        # Asked for every action: it also sends what the others wait for, without which they could never move.
        if not self._runners[k].worker.can_finish_update():
            return False
        if action.kind is ActionKind.F:
            # The inputs of stage 0 are always there; so are the gradients of the last stage, which makes them itself.
            return k == 0 or self._activations[k - 1].can_receive()
        if action.kind is ActionKind.B:
            return k == self.depth - 1 or self._gradients[k].can_receive()
        return True

    def _finish_updates(self) -> None:
        for runner in self._runners.values():
            runner.worker.can_finish_update()  # sends what the others wait for
        super()._finish_updates()

    def _equalize_copies(self, tie: Tied) -> None:
        """Give all copies of a tied weight the values of the first."""
        workers = [self._worker(k) for k in tie.holders]
        check_tied_equal(tie, [describe_tied(w.tied_weight(tie), w.optimizer, w.scheduler) for w in workers])
        copies = [weight for worker in workers if (weight := worker.tied_weight(tie)) is not None]
        with torch.no_grad():
            for copy in copies[1:]:
                for own, first in zip(copy.values, copies[0].values, strict=True):
                    own.copy_(first)


def _refuse_shared(stages: list[nn.Module]) -> None:
    owners: dict[nn.Parameter, tuple[int, str]] = {}
    for k, stage in enumerate(stages):
        for name, p in stage.named_parameters():
            # Frozen parameters may be shared: nobody updates them.
            first, theirs = owners.setdefault(p, (k, name))
            if first != k and p.requires_grad:
                raise ConfigError(
                    f"stages {first} and {k} share a parameter ({theirs!r} and {name!r}), of which each needs a copy, since they update at "
                    "different times; stages, _ = po.untie(stages) makes copies, which pipelines keep equal"
                )


def _checked_modules(given: Any) -> list[nn.Module]:
    if isinstance(given, CutModel) and not isinstance(given, nn.Module):
        given = given.stages
    if isinstance(given, nn.Module) and not isinstance(given, (nn.Sequential, nn.ModuleList)):
        raise ConfigError(f"stages is a {type(given).__name__}, must be a list of modules; po.partition(model, ...) cuts one")
    if not isinstance(given, Iterable) or isinstance(given, Tensor):
        raise ConfigError(f"stages is {given!r}, must be a list of modules, the stages in order")
    stages: list[nn.Module] = []
    for module in given:  # not list(given), which may have no end
        if not isinstance(module, nn.Module):
            raise ConfigError(f"stage {len(stages)} is a {type(module).__name__}, must be a torch.nn.Module")
        stages.append(module)
    if not stages:
        raise ConfigError("stages is empty; give at least one module")
    return stages
