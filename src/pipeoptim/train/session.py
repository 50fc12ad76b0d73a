"""One session of a run on this process: load, train, save, report. Both engines come through here."""

from __future__ import annotations

import time
import warnings
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from torch.optim import Optimizer

from pipeoptim.checkpoint import BackgroundWriter, check_export, load_stage, save, sick_weight
from pipeoptim.engine import PredictionWarning
from pipeoptim.engine.pipeline import Pipeline
from pipeoptim.errors import DivergedError
from pipeoptim.files import write_durably
from pipeoptim.telemetry.metrics import MetricsFile, read_rows, tail_mean, train_losses, truncate_after
from pipeoptim.telemetry.prediction import StageErrors
from pipeoptim.telemetry.progress import ProgressView
from pipeoptim.telemetry.trace import merge_trace
from pipeoptim.train.callbacks import RunView
from pipeoptim.train.evaluate import ObservedLoss
from pipeoptim.train.export import write_export
from pipeoptim.train.group import RunGroup
from pipeoptim.train.loop import Loop
from pipeoptim.train.machine import machine
from pipeoptim.train.recorder import Recorder
from pipeoptim.train.result import RunResult, StageFacts, traced_shares, versions
from pipeoptim.train.run_loggers import open_loggers
from pipeoptim.train.rundir import RunDir, Start
from pipeoptim.train.setup import RunSetup
from pipeoptim.train.signals import StopSignals
from pipeoptim.train.stopping import StopPlan


def run_session(
    run: RunDir,
    setup: RunSetup,
    pipe: Pipeline,
    optimizers: dict[int, Optimizer],
    loss: ObservedLoss,
    group: RunGroup,
    start: Start,
    stop: StopSignals,
    quiet: bool,
) -> RunResult:
    """Train from ``start`` to the end or to a stop. Every process of ``group`` returns the same result.

    Raises:
        DivergedError: the loss or a weight is not finite; what was saved before is kept.
    """
    config = setup.config
    if start.checkpoint is not None:
        for k in pipe.local_stages:
            pipe.load_stage_state_dict(k, load_stage(start.checkpoint, k))
    for sizes in setup.sizes.parts:
        pipe.check_microbatches(sizes.microbatches)  # now, and not in the middle of the run
    if config.export:
        check_export(pipe, run.exported, overwrite=True)
    began = time.monotonic()
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", PredictionWarning)  # the recorder says it, also for stages in other processes
        recorder = None
        if pipe.depth - 1 in pipe.local_stages and setup.replica == 0:
            # Steps behind the checkpoint are trained again and write their rows again.
            truncate_after(run.metrics, start.step)
            file = stack.enter_context(MetricsFile(run.metrics))
            view = stack.enter_context(ProgressView(run.path.name, config.steps, start.step, quiet, not config.survive))
            loggers = {}
            for name, logger in open_loggers(config, run, start.step):
                stack.callback(logger.close)
                loggers[name] = logger
            recorder = Recorder(file, view, loggers, setup.events, config.on_bad != "stop")

        def check(step: int) -> None:
            sick = next(filter(None, group.gather(sick_weight(pipe))), None)
            if sick is not None:
                raise DivergedError(
                    f"the weights of stage {sick[0]} are not finite at step {step} (first: {sick[1]!r}), and were not saved; "
                    "lower --lr, or choose another method"
                )

        saved: set[int] = set()
        how: dict[str, Any] = {
            "config": config.fingerprint(),
            "keep": config.keep_checkpoints,
            "versions": versions(),
            # One that lies behind our start was passed over: it must not stand in for a healthy one.
            "counts": lambda other: other <= start.step or other in saved,
        }
        completed = setup.events.checkpoint if recorder is not None else lambda *_: None
        writer = BackgroundWriter(run.checkpoints, group, completed, **how)
        stack.callback(writer.leave)

        def save_all(step: int) -> None:
            saved.add(step)
            if recorder is not None:
                recorder.sync()
            states = {k: pipe.stage_state_dict(k) for k in pipe.local_stages}  # with what differs between replicas
            mine = states if setup.replica == 0 else {}
            if config.saving == "wait" or config.survive:  # the image that replaces a process has no threads
                completed(step, save(run.checkpoints, step, mine, group=group, **how))
            else:
                writer.begin(step, mine)

        plan = StopPlan(config, pipe.program.flushes, stop, group.gather)

        def end_run(reason: str) -> None:
            if recorder is not None and not plan.reason:
                plan.reason = reason
                recorder.note(reason)
                pipe.request_stop()

        say = (lambda _: None) if recorder is None else recorder.note
        setup.events.begin(RunView(config, run.path, pipe, start.step, recorder is not None, end_run, say))
        pipe.leave_out(run.left_out())
        loop = Loop(
            pipe,
            setup,
            optimizers,
            loss,
            recorder,
            check,
            save_all,
            plan,
            {},
            group.mean_loss,
            group.measurements("figures"),
            group.measurements("timing"),
            StageErrors(),
        )
        validate = start.step >= config.steps and not _validated(recorder, run, group, start.step)
        try:
            done = loop.run(start.step, validate)
        except DivergedError as error:
            if config.on_bad == "rollback" and error.mini_batch is not None:
                run.leave_out(error.mini_batch, str(error))
            raise
        writer.finish()
    if pipe.trace is not None and done > start.step:
        pipe.trace.save(run.trace)
    traced = setup.config.trace and done > start.step
    result = _run_result(run, setup, pipe, loop, group, done, time.monotonic() - began, traced)
    if config.export and result.status == "finished":
        write_export(run, setup, pipe, run.exported)
    if recorder is not None:
        # After the last checkpoint: a crash in between leaves a run that only has to be reported again.
        write_durably(run.result, result.to_json())
        setup.events.end(result)
    # No process returns before the result is on the disk.
    group.barrier()
    return result


def _validated(recorder: Recorder | None, run: RunDir, group: RunGroup, step: int) -> bool:
    """Whether a run whose last checkpoint is that of its last ``step`` has told its validation, too; its figures are recalled."""
    return any(group.gather(recorder is not None and recorder.recall(read_rows(run.metrics), step)))


def _run_result(
    run: RunDir, setup: RunSetup, pipe: Pipeline, loop: Loop, group: RunGroup, done: int, seconds: float, traced: bool
) -> RunResult:
    figures: dict[str, Any] = {}
    if loop.recorder is not None:
        recorder = loop.recorder
        figures = {
            "train_loss": tail_mean(train_losses(read_rows(run.metrics))),
            "val_loss": recorder.val_loss,
            "val_metrics": recorder.val_metrics,
            "samples_per_second": recorder.samples_per_second,
            "seconds": seconds,
        }
    facts = [_stage_facts(setup, pipe, k, loop) for k in pipe.local_stages] if setup.replica == 0 else []
    gathered = group.gather(([asdict(one) for one in facts], figures))
    found = sorted((one for part, _ in gathered for one in part), key=lambda one: one["stage"])
    if traced:  # all have saved theirs before the gathering
        shares = group.gather(traced_shares(merge_trace(run.trace)) if loop.recorder is not None else None)[group.reporter]
        found = [one | shares[one["stage"]] for one in found]
    return RunResult(
        run_dir=run.path,
        status="finished" if done == setup.config.steps or loop.plan.reason else "stopped",
        step=done,
        stopped_by=loop.plan.signal if done < setup.config.steps and not loop.plan.reason else "",
        reason=loop.plan.reason if done < setup.config.steps else "",
        stages=tuple(StageFacts(**one) for one in found),
        data=setup.task.describe(),
        versions=versions(),
        machine=machine(),
        **gathered[group.reporter][1],
    )


def _stage_facts(setup: RunSetup, pipe: Pipeline, k: int, loop: Loop) -> StageFacts:
    return StageFacts(
        stage=k,
        parameters=sum(p.numel() for p in setup.stages[k].parameters() if p.requires_grad),
        gap=pipe.version_gap(k),
        weight_copies=pipe.weight_copies(k),
        weight_bytes=loop.weight_bytes[k],
        updates=pipe.version(k),
        skipped=len(pipe.skipped(k)),
        clipped=pipe.clipped_tensors(k),
        prediction_error=loop.errors.mean(k),
        prediction_scale=loop.errors.mean(k, "scale"),
        best_scale=loop.errors.best_scale(k),
    )
