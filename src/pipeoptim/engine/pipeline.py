"""What all pipelines have in common: feeding mini-batches to the stages of this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeoptim.engine.evaluation import (
    Batch,
    BatchWeights,
    Evaluation,
    WeightedMeans,
    check_countable,
    each_batch,
    evaluation_of,
    read_batch,
)
from pipeoptim.engine.local_stages import LocalStages
from pipeoptim.engine.microbatch_changes import PlannedChanges
from pipeoptim.engine.microbatches import BatchSplitter, MicroBatch, RowShare, StageKwargs, check_weighable, merge_kwargs
from pipeoptim.engine.other_names import OTHER_NAMES
from pipeoptim.engine.processes.connect import Interruptible
from pipeoptim.engine.processes.rendezvous import Rendezvous
from pipeoptim.engine.runner import CountedLoss
from pipeoptim.engine.splitting import count_rows
from pipeoptim.engine.stage.hot_code import record_code
from pipeoptim.engine.stage_times import now
from pipeoptim.engine.step_loss import step_loss
from pipeoptim.errors import ConfigError, counted, first_line
from pipeoptim.options import PipelineOptions
from pipeoptim.options.checks import count, flag
from pipeoptim.schedule import Action, Program


class Pipeline(LocalStages):
    """Base of :class:`~pipeoptim.Emulator` and :class:`~pipeoptim.Schedule`.

    Attributes:
        ranks: global rank of the process of each stage; None where all stages live in this process.
        rendezvous: where its processes meet; None where there is only this one.
    """

    ranks: tuple[int, ...] | None = None
    rendezvous: Rendezvous | None = None
    _place_name = "stage"  # what messages call this process: by this word and the number of its first stage
    _closed = False
    _measured_at = -1  # the mini-batch before which slack is chosen from measurements; none
    _processes: Sequence[int] = (0,)  # those of the program whose actions are carried out here

    def __init__(self, options: PipelineOptions, depth: int, processes: int | None = None) -> None:
        super().__init__(options, depth, processes)
        self._changes = PlannedChanges()
        self._splitter = BatchSplitter(options.microbatches, options.uneven, options.loss_weight)
        self._steps = 0  # mini-batches fed since the last (re)start
        self._fed = 0  # mini-batches fed since the beginning of training
        self._stop_wanted = False
        self._until_recorded = self.program.warm_up + 2  # mini-batches until the code of one is noted, see `hot_code`

    if not TYPE_CHECKING:  # to a type checker, a class that has this would have every name

        def __getattr__(self, name: str) -> Any:
            if name in OTHER_NAMES:
                raise AttributeError(f"{type(self).__name__} has no {name!r}: {OTHER_NAMES[name]}")
            return object.__getattribute__(self, name)  # Python's own error, or that of a property

    def step(
        self,
        *args: Any,
        target: Any = None,
        losses: list[Tensor] | None = None,
        stage_kwargs: StageKwargs | None = None,
        **kwargs: Any,
    ) -> Tensor | None:
        """Train on one mini-batch: F of its micro-batches, and the backwards that are due by then.

        Args:
            args: input of the model; where stage 0 lives.
            target: for ``loss_fn``, with the output of the last stage; where that lives.
            losses: a list that is filled with the loss of each micro-batch, as torch's schedules do; where the last stage lives.
            kwargs: for the first stage that lives here.
            stage_kwargs: those of every stage, ``{2: {"mask": mask}}``; only those of the stages that live here are used, so that all
                processes can make the same call.

        Returns:
            The mini-batch's loss (mean over micro-batches, detached) where the last stage lives; None elsewhere.

        Raises:
            ConfigError: arguments on the wrong stage, a batch that M does not divide, or a loss that is no scalar.
            StageFailure: another stage died or does not answer.
        """
        self._refuse_within_update("step")
        if self._until_recorded:
            self._count_to_recording()
        if self._fed == self._measured_at:
            self._decide_slack()
        if self._changes.planned and (m := self._changes.due(self._fed)):
            self._change_microbatches(m)
        # Everything that can be refused is refused before anything moves, on this process at least.
        if not torch.is_grad_enabled():
            raise ConfigError(
                "step() was called without gradients (inside no_grad or inference_mode); call it outside, or eval_step()"
            )
        if losses is not None and not isinstance(losses, list):
            raise ConfigError(
                f"losses is {losses!r}, must be a list, which is filled with the loss of each micro-batch, or None"
            )
        micro_batches = self._split_batch(self._splitter, args, kwargs, stage_kwargs, target)
        self._note_training()
        if self._stop_wanted:
            for runner in self._runners.values():
                runner.asks_stop = True
        if 0 in self._runners:
            with self._guard():
                self._note_stop()
        found: list[CountedLoss] = []
        for runner in self._runners.values():
            runner.worker.begin_mini_batch()
        try:
            with self._guard():
                self._run_step(micro_batches, found)
        except TypeError as error:
            if target is None and len(args) > 1:
                raise ConfigError(
                    f"the model failed with {len(args)} inputs ({first_line(error)}); if one of them is the target, give it by name: "
                    "step(x, target=y)"
                ) from error
            raise
        ended = now()
        for runner in self._runners.values():
            runner.clock.end_mini_batch(ended)
        # After the actions: they are those of step number _steps, counted from 0.
        self._steps += 1
        if self._still_synchronous():
            self._drain()
        return step_loss(self._mean_loss(found, losses))

    def drain(self) -> None:
        """Run the backwards and updates still in flight; afterwards every stage has the same version."""
        self._refuse_within_update("drain")
        if not self._closed:
            self._note_end()
            self._drain()

    def set_microbatches(self, m: int) -> None:
        """Cut the mini-batches that follow into ``m`` micro-batches. All processes call it between the same two steps.

        Drains first, so that the version gaps of the new order count from here; the batch size may change as well, and learning rates
        stay what they are. A checkpoint does not hold M: who resumes gives the M of that moment.

        May also be called from ``on_update(k, version)``, on all stages at the same version. It then takes effect before mini-batch
        ``version + g``, counted from the beginning of training, g the largest version gap: the first that every stage begins with
        that update made.

        Raises:
            ConfigError: the method or an option does not work with ``m``; nothing has changed then.
            PipeOptimError: another stage was given another number, or none.
        """
        m = count("microbatches", m)
        program = self._program_with(m)
        if self._changes.version is not None:
            self._changes.plan(m, self._changes.version, self.program)
        elif program != self.program:
            self._change_microbatches(m)

    def eval_step(
        self, *args: Any, target: Any = None, drain: bool = True, stage_kwargs: StageKwargs | None = None, **kwargs: Any
    ) -> Tensor | None:
        """Loss on the latest weights, in eval mode and without gradient, where the last stage lives; None elsewhere.

        :attr:`loss_parts` are then those of this batch. Drains first, so that all stages have the same version. With
        ``drain=False`` nothing in flight is disturbed and each stage uses the latest weights it has, which in mid-flight are of
        different versions.
        """
        self._refuse_within_update("eval_step")
        if flag("drain", drain):
            self.drain()
        (micro_batch,) = self._split_batch(BatchSplitter(1), args, kwargs, stage_kwargs, target)
        self._note_end()
        with self._guard():
            loss, _ = self._evaluate(micro_batch)
        return loss

    def evaluate(self, batches: Iterable[Any], drain: bool = True) -> Evaluation:
        """Mean loss and parts over ``batches``, in eval mode and without gradient, each batch weighted by its rows.

        All processes call it with equally many batches; each uses of a batch what its own stages need, and all get the same result.
        Batches may have different numbers of rows. Where ``loss_weight`` is given, batches are weighted by it.

        Args:
            batches: an iterable of ``(inputs, target)`` or ``(inputs, target, stage_kwargs)``. Inputs are a tuple of positional
                arguments, a dict of keyword arguments for stage 0, or else one argument.
            drain: as in :meth:`eval_step`.

        Raises:
            ConfigError: a batch of another form, no batch, or batches whose numbers of rows are not clear, as those of time-major
                sequences without ``Along`` are.

        Example:
            >>> import torch, pipeoptim as po
            >>> loss_fn = lambda output, target: ((output - target).abs().mean(), {"largest": (output - target).abs().max()})
            >>> stages = [torch.nn.Identity(), torch.nn.Identity()]
            >>> pipe = po.Emulator(stages, [None, None], loss_fn, "1f1b")
            >>> found = pipe.evaluate([(torch.ones(3, 1), torch.zeros(3, 1)), (torch.ones(1, 1), torch.full((1, 1), 5.0))])
            >>> found.loss, found.parts, found.weight
            (1.75, {'largest': 1.75}, 4.0)
        """
        self._refuse_within_update("evaluate")
        each = each_batch(batches)
        if flag("drain", drain):
            self.drain()
        return evaluation_of(self._evaluate_all(each))

    def load_stage_state_dict(self, k: int, state: dict[str, Any]) -> None:
        """Continue stage ``k`` from :meth:`stage_state_dict`.

        Raises:
            PipeOptimError: micro-batches are in flight; call :meth:`drain` first.
        """
        self._worker(k).load_state_dict(state)
        self._fed = self.version(k)
        self._steps = 0

    def request_stop(self) -> None:
        """Ask the run to stop, in any process: every stage sees :attr:`stop_requested` after the same step.

        From stage 0 it is the next one; from another stage, the wish has first to reach stage 0 with gradients.
        """
        self._stop_wanted = True  # takes effect at the next step, also when a signal handler calls this inside one

    @property
    def stop_requested(self) -> bool:
        """Whether a stop was requested; equal on every stage after the same step."""
        return any(runner.stop for runner in self._runners.values())

    def meeting(self, place: Interruptible | None = None) -> AbstractContextManager[object]:
        """For a collective of the processes of this pipeline: it ends when one of them is dead, and says which one failed first.

        Args:
            place: where they meet, if not in groups of their rendezvous; interrupted as those are.

        Raises:
            StageFailure: the collective has failed.
        """
        return nullcontext()

    def close(self) -> None:
        """Release what the pipeline holds outside this process: the connections of a ``Schedule``; nothing of an ``Emulator``."""

    def _refuse_within_update(self, call: str) -> None:
        """Between two actions of a step nothing else can be carried out, unless the step ends with its updates."""
        if self._changes.version is not None and not self.program.flushes:
            raise ConfigError(
                f"{call}() was called from within on_update, in the middle of a step; call it between two steps (set_microbatches() and "
                "request_stop() may be called there)"
            )

    def _change_microbatches(self, m: int) -> None:
        program = self._program_with(m)
        with self._guard():
            # Before the drain, in which a stage would wait for one that goes on training.
            for runner in self._runners.values():
                runner.pass_on_change(m)
        self.drain()
        self._use_program(program)

    def _use_program(self, program: Program) -> None:
        super()._use_program(program)
        self._splitter = replace(self._splitter, m=program.microbatches)
        for runner in self._runners.values():
            runner.splitter = self._splitter
        self.restart_stage_times()

    def _count_to_recording(self) -> None:
        self._until_recorded -= 1
        if not self._until_recorded:
            runners = self._runners.values()
            record_code(Pipeline.step.__code__, [self, *runners, *(runner.worker for runner in runners)], self._use_prefetch)

    def _use_prefetch(self, prefetch: Callable[[], None]) -> None:
        for runner in self._runners.values():
            runner.worker.prefetch_code = prefetch

    # -- carrying actions out ----------------------------------------------------------------------------------------

    def _run_step(self, micro_batches: list[MicroBatch], losses: list[CountedLoss]) -> None:
        """The actions of the next mini-batch."""
        self._run_actions([self.program.process_step(p, self._steps) for p in self._processes], micro_batches, losses)
        # Nothing follows in this step that would finish updates waiting for other stages.
        if self.program.flushes:
            self._finish_updates()

    def _run_drain(self) -> None:
        """The actions still in flight."""
        # Only backwards and updates are left: there is nothing to feed, and no loss to come.
        self._run_actions([self.program.process_drain(p, self._steps) for p in self._processes], [], [])
        self._finish_updates()

    def _run_actions(
        self, todo: list[list[tuple[int, Action]]], micro_batches: list[MicroBatch], losses: list[CountedLoss]
    ) -> None:
        """Carry out the actions of this process in their order; the stages they wait for act in other processes."""
        for actions in todo:
            for k, action in actions:
                self._runners[k].run(action, micro_batches, losses)

    def _finish_updates(self) -> None:
        """Carry out updates that were begun and still wait for other stages."""
        for runner in self._runners.values():
            runner.worker.finish_update()

    def _evaluate(self, micro_batch: MicroBatch) -> tuple[Tensor | None, RowShare]:
        """Forward through the stages that live here, on the latest weights: the loss if it is here, and the rows."""
        outputs = [runner.evaluate(micro_batch) for runner in self._runners.values()]
        # In the order of stages: where the last one lives here, its loss is at the end.
        return outputs[-1]

    def _evaluate_all(self, batches: Iterator[Any]) -> dict[str, Any]:
        means, weights = WeightedMeans(), BatchWeights(self.options.loss_weight)
        for number, batch in enumerate(batches, 1):
            self._note_end(number)
            self._evaluate_batch(number, read_batch(batch), means, weights)
        with self._guard():
            return self._of_last_stage(means.result())

    def _evaluate_batch(self, number: int, batch: Batch, means: WeightedMeans, weights: BatchWeights) -> None:
        first, last = 0 in self._runners, self.depth - 1 in self._runners
        args, kwargs = (batch.args, batch.kwargs) if first else ((), {})
        target = batch.target if last else None
        if last:
            check_weighable(self.options.loss_weight, target)
        (micro_batch,) = self._split_batch(BatchSplitter(1), args, kwargs, batch.stage_kwargs, target)
        # Counted here and sent along: the last stage, which weights the batch, may not have the inputs.
        rows = count_rows(*args, *kwargs.values()) or 0
        if first and not rows and self.options.loss_weight is None:
            check_countable(number, [*args, *kwargs.values()], batch.target)
        with self._guard():
            loss, share = self._evaluate(micro_batch._replace(row_share=RowShare(rows, rows)))
        if loss is not None:
            weight = weights.weight(number, share.rows, micro_batch.target)
            means.add(loss, self._worker(self.depth - 1).losses.means(), weight)

    def _of_last_stage(self, result: dict[str, Any]) -> dict[str, Any]:
        """``result`` as the process of the last stage found it."""
        return result

    def _note_training(self) -> None:
        """A mini-batch begins; for who says why a wait for another process failed."""

    def _note_end(self, evaluated: int = 0) -> None:
        """No mini-batch begins before all processes have come here; the ``evaluated``-th batch of an evaluation begins."""

    def _guard(self) -> AbstractContextManager[None]:
        """Entered around what may wait for other processes."""
        return nullcontext()

    def _decide_slack(self) -> None:
        """What a step does in which slack is chosen."""

    # -- what they have in common ------------------------------------------------------------------------------------

    def _split_batch(
        self, splitter: BatchSplitter, args: Any, kwargs: dict[str, Any], stage_kwargs: StageKwargs | None, target: Any
    ) -> list[MicroBatch]:
        """What was given to the stages that live here, by micro-batches."""
        first = min(self._runners)
        here = f"{self._place_name} {first}"
        if args and first > 0:
            raise ConfigError(
                f"{here} was given {counted(len(args), 'input')}, but only {self._place_name} 0 takes them; leave them out elsewhere: "
                "step(*([x] if k == 0 else []), ...), and give arguments of a stage's own as keywords"
            )
        every = merge_kwargs(self.depth, kwargs, first, stage_kwargs)
        mine = {k: own for k, own in every.items() if k in self._runners and own}
        last = self.depth - 1 in self._runners
        return splitter.cut("" if self.ranks is None else f" of {here}", args, mine, target, last)

    def _still_synchronous(self) -> bool:
        """Whether the method still wants training to be synchronous; the same on every stage."""
        # Counted from the beginning of training, not from the last drain: a warm-up ends once.
        self._fed += 1
        return self._fed <= self.method.synchronous_updates

    def _note_stop(self) -> None:
        """Called on stage 0 before a mini-batch is fed, so that all its micro-batches carry the same flag."""
        first = self._runners[0]
        first.stop = first.stop or first.asks_stop

    @staticmethod
    def _mean_loss(found: list[CountedLoss], losses: list[Tensor] | None) -> Tensor | None:
        """The loss of a mini-batch from those of its micro-batches, which the caller's list also receives."""
        if losses is not None:
            # In place: the list is the caller's, who may pass the same one to every step.
            losses[:] = [loss for loss, _ in found]
        if len(found) < 2:
            return found[0][0] if found else None
        if all(share is None for _, share in found):
            # On the device of the loss, without reading it: the caller decides when to wait.
            return torch.stack([loss for loss, _ in found]).mean()
        shares = [1 / len(found) if share is None else share for _, share in found]
        # A share of 0 is left out, for the loss of no rows is NaN and 0 times NaN as well.
        return torch.stack([loss * share for (loss, _), share in zip(found, shares, strict=True) if share]).sum()

    def _drain(self) -> None:
        with self._guard():
            self._run_drain()
        self._restart()

    def _restart(self) -> None:
        """Nothing is in flight: the next micro-batch is number 0 again."""
        for runner in self._runners.values():
            runner.worker.restart()
        self._steps = 0
