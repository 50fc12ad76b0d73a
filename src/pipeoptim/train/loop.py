"""The training loop: the same for both engines, and on every process of a run.

At a step where a checkpoint is due the pipeline drains, validates and saves, in this order; all processes take the same decision
from the step number and from the stop flag that travels with the activations; see :mod:`~pipeoptim.train.stopping`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor
from torch.optim import Optimizer

from pipeoptim.engine.pipeline import Pipeline
from pipeoptim.errors import counted
from pipeoptim.schedule import describe_slack
from pipeoptim.telemetry import prediction
from pipeoptim.telemetry.timing import TIMED_EVERY, timing_rows
from pipeoptim.train.evaluate import ObservedLoss, evaluate
from pipeoptim.train.measurements import StageMeasurements
from pipeoptim.train.ramps import Sizes
from pipeoptim.train.recorder import Recorder
from pipeoptim.train.setup import RunSetup
from pipeoptim.train.stopping import StopPlan

SCALED_EVERY = 20
"""Mini-batches between two rows of prediction errors, with the factors that adapt to them, where monitor_every does not say it."""

_INEXACT = (
    "This step lies between two checkpoints: the pipeline was drained for it, so the resumed run goes on from here, but not bit for bit as "
    "one that was never stopped. Save more often (--checkpoint-every), or give more time (--grace)."
)


@dataclass
class Loop:
    """One session of a run.

    Args:
        pipe: the engine.
        optimizers: of the stages here.
        loss: what ``pipe`` was given as its loss.
        recorder: where the last stage is; None elsewhere.
        check: raises where the weights of a drained pipeline are not finite, in all processes; given the number of mini-batches done.
        save: writes a checkpoint of a drained pipeline, given the same number.
        plan: where the run stops when it is asked to.
        weight_bytes: filled with the bytes of weights that each stage held.
        mean_loss: of the losses of all replicas.
        measurements: brings measured prediction errors to the recorder.
        timings: brings the times of stages there.
        errors: filled with the prediction errors of the stages here.
    """

    pipe: Pipeline
    setup: RunSetup
    optimizers: dict[int, Optimizer]
    loss: ObservedLoss
    recorder: Recorder | None
    check: Callable[[int], None]
    save: Callable[[int], None]
    plan: StopPlan
    weight_bytes: dict[int, int]
    mean_loss: Callable[[Tensor], Tensor]
    measurements: StageMeasurements
    timings: StageMeasurements
    errors: prediction.StageErrors
    _told: bool = False

    def run(self, start: int, validate: bool = False) -> int:
        """Train from mini-batch ``start`` to the end, or until stopped. Returns the number of mini-batches done in all.

        ``validate``: where nothing is left to train, since the run ended before its validation was reported.
        """
        config, plan = self.setup.config, self.plan
        done = start
        if start >= config.steps:  # trained and saved, but not all reported
            self._measure_weight_bytes()
            if validate:
                self._validate(start)
        elif plan.agreed():  # a signal came while the run was set up
            self._measure_weight_bytes()
            return done
        while done < config.steps:
            self._step(done)
            done += 1
            if _is_due(done, config.monitor_every or (SCALED_EVERY if config.scale == "auto" else 0)):
                self._monitor(done)
            if _is_due(done, TIMED_EVERY):
                self._time_stages(done)
            last, stopped = done == config.steps, self.pipe.stop_requested
            saves = last or stopped or _is_due(done, config.checkpoint_every)
            if stopped and not last:
                self._note(f"stopping: saving step {done} (Ctrl-C again to abort)")
                if not plan.is_exact(done) and not plan.reason:
                    self._note(_INEXACT)
            began = time.perf_counter()
            plan.stop.saving = saves
            if saves:
                self._measure_weight_bytes()
                self.pipe.drain()
                self.check(done)  # before anything is reported or saved of them
            if last or _is_due(done, config.eval_every):
                self._validate(done)
            if saves:
                # Before the checkpoint: a resumed run does not write the rows of earlier steps again.
                self._record_predictions(wait=True)
                self._record_timings(wait=True)
                with self._traced_block("checkpoint"):
                    self.save(done)
                plan.note_save(time.perf_counter() - began)
            if saves and not last and (plan.agreed() or stopped):
                break
            plan.stop.saving = last  # until the end of the session, for what is written in the background
        return done

    def _step(self, step: int) -> None:
        pipe, sizes = self.pipe, self.setup.sizes.at(step)
        if sizes.microbatches != pipe.microbatches:
            pipe.set_microbatches(sizes.microbatches)
        elif step == sizes.first:
            pipe.restart_stage_times()  # mini-batches have another size from here on
        first, last = 0 in pipe.local_stages, pipe.depth - 1 in pipe.local_stages
        self._heed_signals(step)
        # Before the step, in which the scheduler advances.
        lr = self.optimizers[pipe.depth - 1].param_groups[0]["lr"] if last else 0.0
        began = time.perf_counter()
        with self._traced_block("data"):
            x, y = self._batch(sizes, step) if first or last else (None, None)
        slack = pipe.slack
        value = pipe.step(*((x,) if first else ()), target=y if last else None)
        self.plan.note_step(time.perf_counter() - began)
        if self.recorder and pipe.slack != slack:
            self.recorder.note(f"slack {describe_slack(pipe.slack)} was chosen from the first {counted(step, 'mini-batch')}")
        if value is None:
            return
        value = self.mean_loss(value)
        if self.recorder:
            finite = pipe.stage_worker(pipe.depth - 1).finite
            # The update of this mini-batch may still be waiting.
            left_out = bool(finite.found) or finite.skipped[-1:] == [step]
            self.recorder.step(step + 1, float(value), float(lr), time.perf_counter() - began, sizes.batch_size, left_out)

    def _heed_signals(self, done: int) -> None:
        if not self.plan.stop.wanted:
            return
        if self.plan.at_once(done):
            # Asked by any stage: the wish travels to stage 0, and its decision with the activations, so that all stop at the same step.
            self.pipe.request_stop()
        elif not self._told:
            self._told = True
            self._note(
                f"{self.plan.stop.name}: stops at step {self.plan.next_checkpoint(done)}, the next checkpoint (Ctrl-C again to abort)"
            )

    def _note(self, text: str) -> None:
        if self.recorder is not None:
            self.recorder.note(text)

    def _batch(self, sizes: Sizes, step: int) -> Iterable[Tensor]:
        batch = self.setup.task.train_batch(sizes.batch(step), sizes.batch_size)
        return (self.setup.replica_rows(part, sizes.microbatches) for part in batch)

    def _validate(self, step: int) -> None:
        # Where a checkpoint is due the pipeline is drained already; elsewhere draining would change what is trained.
        figures = evaluate(self.pipe, self.setup, self.loss, drain=False)
        if figures is not None and self.recorder:
            self.recorder.validation(step, *figures)

    def _monitor(self, step: int) -> None:
        """Report the errors of the stages' newest predictions."""
        measured = [row for k in self.pipe.local_stages for row in prediction.rows(self.pipe.prediction_error(k))]
        self.errors.note(measured)
        if self.setup.replica == 0:
            self.measurements.post(step, measured)
        self._record_predictions(wait=False)

    def _time_stages(self, step: int) -> None:
        """Report how long the stages take."""
        if self.setup.replica == 0:
            rows = timing_rows(self.pipe.stage_times(k) for k in self.pipe.local_stages)
            for row in rows:
                if (clipped := self.pipe.clipped_tensors(row["stage"])) is not None:
                    row["clipped"] = clipped
            self.timings.post(step, rows)
        self._record_timings(wait=False)

    def _record_timings(self, wait: bool) -> None:
        if self.recorder is not None:
            for step, measured in self.timings.collect(wait):
                self.recorder.timing(step, measured)

    def _record_predictions(self, wait: bool) -> None:
        if self.recorder is not None:
            for step, measured in self.measurements.collect(wait):
                self.recorder.prediction(step, measured)

    def _traced_block(self, name: str) -> AbstractContextManager[None]:
        """Names a block in the trace, if there is one."""
        return nullcontext() if self.pipe.trace is None else self.pipe.trace.span(name)

    def _measure_weight_bytes(self) -> None:
        """Bytes of weights in mid-flight, where copies exist that a drained pipeline may have given back."""
        for k in self.pipe.local_stages:
            self.weight_bytes[k] = max(self.weight_bytes.get(k, 0), self.pipe.weight_bytes(k))


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
