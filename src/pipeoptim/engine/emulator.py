"""A whole pipeline in one process: the reference for the distributed engine, and the tool of those who compare methods."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pipeoptim.engine import traced
from pipeoptim.engine.microbatches import MicroBatch, RowShare, StageKwargs
from pipeoptim.engine.pipeline import CountedLoss, Pipeline
from pipeoptim.engine.processes.gradient_exchange import LocalGradientSum
from pipeoptim.engine.processes.norm_exchange import LocalNormExchange
from pipeoptim.engine.stage.tied_weights import Tied, TieOnStage, check_tied_equal, describe_tied, read_tied
from pipeoptim.engine.stage.worker import LossFn
from pipeoptim.engine.transport.pytree import as_args, transferred
from pipeoptim.errors import ConfigError, PipeOptimError
from pipeoptim.methods import Method
from pipeoptim.options import OPTIONS, OptionKeywords, PipelineOptions, takes_options
from pipeoptim.schedule import Action, ActionKind

OptimizerMaker = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerMaker = Callable[[Optimizer], LRScheduler]


@takes_options(OPTIONS)
class Emulator(Pipeline):
    """Trains ``stages`` in this process exactly as one process per stage would.

    Every stage follows its own action program; what a stage needs of its neighbours is there before it acts, and nothing is
    flushed between mini-batches unless the method says so. On the CPU, weights are equal bit for bit to those of
    :class:`~pipeoptim.Schedule` with the same seeds, step after step.

    Args:
        stages: D modules that run one after the other. A tuple output becomes the next stage's positional arguments.
        optimizers: one per stage, or a callable that makes one from parameters. Stepped by the pipeline, never by you.
        loss_fn: ``loss_fn(output, target) -> scalar``, mean over the micro-batch; or ``{"loss": scalar, name: part, ...}``, or
            ``(scalar, {name: part})``: the parts are reported by :attr:`loss_parts`.
        method: a name in :data:`pipeoptim.METHODS`, or a :class:`~pipeoptim.Method` of your own.
        microbatches: M slices per mini-batch and update; 1 is the default of the asynchronous methods.
        schedulers: one learning-rate scheduler per stage, or a callable that makes one; advanced once per update.
        processes: act as P processes with D/P stages each, stage k on process ``k mod P``, in the interleaved order
            (see :class:`~pipeoptim.InterleavedSchedule`); by default one stage per process.
        options: those of :class:`~pipeoptim.PipelineOptions`.

    Raises:
        ConfigError: no stages, wrong number of optimizers, unknown method, or parts that do not fit together.

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
        stages: Sequence[nn.Module],
        optimizers: Sequence[Optimizer] | OptimizerMaker,
        loss_fn: LossFn,
        method: str | Method = "pipeoptim",
        microbatches: int = 1,
        *,
        schedulers: Sequence[LRScheduler] | SchedulerMaker | None = None,
        processes: int | None = None,
        **options: Unpack[OptionKeywords],
    ) -> None:
        stages = _modules(stages)
        _refuse_shared(stages)
        scalers = _scalers(stages, options.pop("scaler", None))
        read = PipelineOptions.read("Emulator", OPTIONS, method, microbatches, options)
        super().__init__(read, len(stages), processes)
        chosen = _one_each("optimizers", stages, optimizers, lambda m: list(m.parameters()))
        rates = _one_each("schedulers", stages, schedulers, lambda m: chosen[stages.index(m)])
        _check_optimizers(chosen)
        board = LocalNormExchange(len(stages)) if read.clip is not None and read.clip.exchanges else None
        scaled = any(isinstance(one, GradScaler) and one.is_enabled() for one in scalers)
        ties = read_tied(read.tied, self.program, self.method, read.clip, scaled)
        sums = [LocalGradientSum(tie.holders) for tie in ties]
        for k, module in enumerate(stages):
            row = self._row(k, next((p.device for p in module.parameters()), torch.device("cpu")))
            self._workers[k] = traced.worker(row)(
                module,
                chosen[k],
                self.method,
                self.program,
                k,
                loss_fn,
                scheduler=rates[k],
                options=replace(read, scaler=scalers[k]),
                norms=None if board is None else board.end(k),
                ties=[TieOnStage(tie, k, own.end(k)) for tie, own in zip(ties, sums, strict=True) if k in tie.holders],
            )
        for tie in ties:
            self._join(tie)
        self._activations: list[deque[tuple[Any, float, RowShare]]] = [deque() for _ in stages]
        self._gradients: list[deque[tuple[Any, float]]] = [deque() for _ in stages]

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

    def _advance(self, micro_batches: list[MicroBatch], losses: list[CountedLoss]) -> None:
        first = self._steps * self.microbatches
        self._run([self.program.step(k, self._steps) for k in range(self.depth)], first, micro_batches, losses)

    def _finish(self) -> None:
        self._run([self.program.drain(k, self._steps) for k in range(self.depth)], 0, [], [], settle=True)

    def _evaluate(self, micro_batch: MicroBatch) -> Tensor:
        value: Any = micro_batch.args
        for k, worker in self._workers.items():
            inputs = value if k == 0 else as_args(transferred(value))
            value = worker.evaluate(inputs, micro_batch.kwargs.get(k, {}), micro_batch.target)
        assert isinstance(value, Tensor)
        return value

    def _run(
        self,
        todo: list[list[Action]],
        first: int,
        micro_batches: list[MicroBatch],
        losses: list[CountedLoss],
        settle: bool = False,
    ) -> None:
        """Let every stage act as far as it can, in turn, until all lists are done; ``settle``: and no update waits."""
        queues = [deque(actions) for actions in todo]
        while any(queues):
            before = sum(map(len, queues))
            for k, queue in enumerate(queues):
                while queue and self._can(k, queue[0]):
                    self._act(k, queue.popleft(), first, micro_batches, losses)
            if sum(map(len, queues)) == before:
                raise PipeOptimError(f"the program deadlocks at {[str(q[0]) for q in queues if q]}")
        if settle or self.program.flushes:
            for worker in self._workers.values():
                worker.can_finish_update()  # tells what the others wait for
            for worker in self._workers.values():
                worker.finish_update()

    def _join(self, tie: Tied) -> None:
        """Let all copies of a tied weight begin with the values of the first."""
        workers = [self._workers[k] for k in tie.holders]
        check_tied_equal(tie, [describe_tied(w.tied_weight(tie), w.optimizer, w.scheduler) for w in workers])
        copies = [weight for worker in workers if (weight := worker.tied_weight(tie)) is not None]
        with torch.no_grad():
            for copy in copies[1:]:
                for own, first in zip(copy.values, copies[0].values, strict=True):
                    own.copy_(first)

    def _can(self, k: int, action: Action) -> bool:
        if not self._workers[k].can_finish_update():
            return False
        if action.kind is ActionKind.F:
            return k == 0 or bool(self._activations[k])
        if action.kind is ActionKind.B:
            return k == self.depth - 1 or bool(self._gradients[k])
        return True

    def _act(self, k: int, action: Action, first: int, micro_batches: list[MicroBatch], losses: list[CountedLoss]) -> None:
        worker, i = self._workers[k], action.number
        if action.kind is ActionKind.F:
            self._forward(k, i, micro_batches[i - first], losses)
        elif action.kind is ActionKind.B:
            received, scale = ([], 0.0) if worker.is_last else self._gradients[k].popleft()
            gradients = worker.backward(i, worker.compressor.unpack(received) if received else [], scale)
            if k > 0:
                message = worker.compressor.pack_gradients(i, gradients, worker.loss_scale)
                self._gradients[k - 1].append((message, worker.loss_scale))
        else:
            worker.update()

    def _forward(self, k: int, i: int, micro_batch: MicroBatch, losses: list[CountedLoss]) -> None:
        worker, args, row_share = self._workers[k], micro_batch.args, micro_batch.row_share
        if k > 0:
            value, overflowed, row_share = self._activations[k].popleft()
            worker.note_overflow(overflowed)
            args = as_args(worker.compressor.unpack(value))
        output, share = worker.forward_part(i, args, micro_batch, row_share, self._splitter)
        if not worker.is_last:
            message = transferred(worker.compressor.pack_activations(i, output))
            self._activations[k + 1].append((message, worker.overflow_to_send(), row_share))
        elif not row_share.empty:
            losses.append((output, share))


def _refuse_shared(stages: list[nn.Module]) -> None:
    owners: dict[nn.Parameter, tuple[int, str]] = {}
    for k, stage in enumerate(stages):
        for name, p in stage.named_parameters():
            first, theirs = owners.setdefault(p, (k, name))
            if first != k and p.requires_grad:
                raise ConfigError(
                    f"stages {first} and {k} share a parameter ({theirs!r} and {name!r}), of which each needs a copy, since they update at "
                    "different times; stages, tied = po.untie(stages) makes copies, which tied=tied keeps equal"
                )


def _one_each(what: str, stages: list[nn.Module], given: Any, argument: Callable[[nn.Module], Any]) -> list[Any]:
    """One object per stage from a sequence of them, from a callable that makes one, or None for each."""
    if given is None:
        return [None] * len(stages)
    if callable(given):
        made = []
        for module in stages:
            value = argument(module)
            made.append(None if value is None or value == [] else given(value))
        return made
    if not isinstance(given, (list, tuple)):
        raise ConfigError(
            f"{what} is one {type(given).__name__} for {len(stages)} stages; give a list of one per stage, or a function that makes one"
        )
    if len(given) != len(stages):
        raise ConfigError(f"{what} has {len(given)} entries for {len(stages)} stages; give one per stage")
    return list(given)


def _modules(given: Any) -> list[nn.Module]:
    if isinstance(given, nn.Module) and not isinstance(given, (nn.Sequential, nn.ModuleList)):
        raise ConfigError(
            f"stages is a {type(given).__name__}, must be a list of modules; po.partition(model, ...).stages cuts one"
        )
    stages = list(given)
    if not stages:
        raise ConfigError("stages is empty; give at least one module")
    for k, module in enumerate(stages):
        if not isinstance(module, nn.Module):
            raise ConfigError(f"stage {k} is a {type(module).__name__}, must be a torch.nn.Module")
    return stages


def _check_optimizers(chosen: list[Any]) -> None:
    for k, optimizer in enumerate(chosen):
        if optimizer is not None and not hasattr(optimizer, "param_groups"):
            raise ConfigError(
                f"the optimizer of stage {k} is a {type(optimizer).__name__}, must be a torch.optim.Optimizer, or None for none"
            )


def _scalers(stages: list[nn.Module], given: Any) -> list[GradScaler | None]:
    if isinstance(given, GradScaler):
        raise ConfigError(
            'scaler is one GradScaler, but each stage needs its own; pass scaler=lambda: torch.amp.GradScaler("cuda")'
        )
    return [given() for _ in stages] if callable(given) else _one_each("scaler", stages, given, lambda _: None)
