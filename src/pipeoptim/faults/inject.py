"""Makes the failures happen: a callback of the run that is disturbed, which puts itself before what the pipeline does.

::

    pipe.step     counts mini-batches, and sees that a process has come as far as the dead one
    runner.run    forward, backward, update   \\
    link.send               send               \\  just before: is a failure due?
    runner.evaluate         validation         /
    pipe.stage_state_dict   checkpoint        /
    os.fork                 image                 just after: the image has not said yet that it is there

No other run has any of this.
"""

from __future__ import annotations

import errno
import os
import signal
import stat
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pipeoptim.checkpoint.manifest import folder_name
from pipeoptim.engine.process_pipeline import ProcessPipeline
from pipeoptim.engine.runner import StageRunner
from pipeoptim.engine.stage.worker import StageWorker
from pipeoptim.engine.survival import Survival
from pipeoptim.faults.promise import audited
from pipeoptim.faults.records import FaultRecords
from pipeoptim.schedule import Action, ActionKind
from pipeoptim.train.callbacks import Callback, RunView

_EVENTS = {ActionKind.F: "forward", ActionKind.B: "backward", ActionKind.U: "update"}


class Inject(Callback):
    """What is planned stands beside the run's folder."""

    def on_start(self, run: RunView) -> None:
        """The pipeline is set up, and nothing has begun."""
        hooks = Hooks(run, FaultRecords.beside(run.folder))
        for k in run.pipe.local_stages:
            hooks.watch_stage(k, run.pipe._runners[k])
            hooks.watch_sends(k, run.pipe._runners[k])
        hooks.watch_steps()
        if isinstance(run.pipe, ProcessPipeline) and run.pipe._survival is not None:
            hooks.watch_images(run.pipe._survival)


class Hooks:
    """Of the stages of one process.

    Args:
        run: which begins.
        records: what is planned, and what has happened already.
    """

    def __init__(self, run: RunView, records: FaultRecords) -> None:
        self._pipe, self._records = run.pipe, records
        mine = [(index, fault) for index, fault in enumerate(records.planned()) if fault.stage in run.pipe.local_stages]
        self._due: dict[tuple[str, int | None, int], list[tuple[int, str]]] = defaultdict(list)
        for index, fault in mine:
            self._due[fault.event, fault.stage, fault.number].append((index, fault.kind))
        self._open = {index: fault.kind for index, fault in mine if records.recovered(index) is None}
        self._counts: dict[tuple[str, int], int] = defaultdict(lambda: run.start)
        self._to_send: dict[int, int] = {}  # by stage, the mini-batch of which nothing was sent yet
        self._begun = self._first = run.start  # mini-batches; the one at which this process's life began
        self._process = os.getpid()

    def watch_stage(self, k: int, runner: StageRunner) -> None:
        """Before every action and evaluation of stage ``k``."""
        run, evaluate = runner.run, runner.evaluate

        def watched_run(action: Action, micro_batches: Sequence[Any], losses: list[Any]) -> None:
            kind, i = action
            if kind is ActionKind.U or i % self._pipe.microbatches == 0:
                event = _EVENTS[kind]
                number = self._counts[event, k]
                self._counts[event, k] += 1
                self._look(event, k, number, runner.worker)
                if kind is (ActionKind.B if runner.worker.is_last else ActionKind.F):
                    self._to_send[k] = number
            run(action, micro_batches, losses)

        def watched_evaluate(micro_batch: Any) -> Any:
            self._look("validation", k, self._begun, runner.worker)
            return evaluate(micro_batch)

        runner.run, runner.evaluate = watched_run, watched_evaluate  # type: ignore[method-assign]

    def watch_sends(self, k: int, runner: StageRunner) -> None:
        """Before the first message of each mini-batch to the next stage; of the last stage, to the one before."""
        link = runner.ports.to_next or runner.ports.to_previous
        if link is None:
            return
        send = link.send

        def watched_send(*args: Any, **options: Any) -> None:
            number = self._to_send.pop(k, None)  # None: a later micro-batch's, or an evaluation's
            if number is not None:
                self._look("send", k, number, runner.worker)
            send(*args, **options)

        link.send = watched_send  # type: ignore[method-assign]

    def watch_images(self, survival: Survival) -> None:
        """Just after a process was forked, while nobody knows yet whether its image is there."""
        keep, k = survival._standby.keep, survival.k

        def watched_keep(mini_batch: int, in_image: Callable[[], None]) -> bool:
            fork = os.fork

            def watched_fork() -> int:
                os.fork = fork
                process = fork()
                if process:
                    self._look("image", k, mini_batch, self._pipe.stage_worker(k))
                return process

            os.fork = watched_fork
            return keep(mini_batch, in_image)

        survival._standby.keep = watched_keep  # type: ignore[method-assign]

    def watch_steps(self) -> None:
        """Before every mini-batch, and where the state of a stage is taken for a checkpoint."""
        pipe = self._pipe
        step, state = pipe.step, pipe.stage_state_dict

        def watched_step(*args: Any, **options: Any) -> Any:
            self._begin()
            return step(*args, **options)

        def watched_state(k: int) -> dict[str, Any]:
            self._look("checkpoint", k, self._begun, pipe.stage_worker(k))
            return state(k)

        pipe.step, pipe.stage_state_dict = watched_step, watched_state  # type: ignore[method-assign]

    def _begin(self) -> None:
        self._note_life()
        for index, kind in [*self._open.items()]:
            fired = self._records.fired(index)
            if fired is None:
                continue
            same_life = fired.process == os.getpid()
            if same_life and kind == "disk":  # what is written in the background is told later, and training goes on until then
                self._records.note_begun(index, self._begun + 1)
            elif self._begun >= fired.begun:
                self._records.recover(index, 0 if same_life else max(0, fired.begun - self._first))
                del self._open[index]
        self._begun += 1

    def _note_life(self) -> None:
        """An image that was woken is in the middle of the mini-batch at whose beginning it was left."""
        if self._process != os.getpid():
            self._process, self._first = os.getpid(), self._begun - 1

    def _look(self, event: str, k: int, number: int, worker: StageWorker) -> None:
        for index, kind in self._due.get((event, k, number), ()):
            self._note_life()
            if self._records.fire(index, self._begun - (event == "image")):  # which is made at the beginning of a mini-batch
                INJECT[kind](worker)


def _kill(_: StageWorker) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _freeze(_: StageWorker) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)  # the command that watches the run continues it


def _flip_gradient(worker: StageWorker) -> None:
    gradient = next((p.grad for p in worker.parameters if p.grad is not None), None)
    if gradient is not None:
        _flip(gradient)


def _flip_weights(worker: StageWorker) -> None:
    """While the update is made, where it is made twice; else before it."""
    audit, weight = worker.update.audit, worker.parameters[0].detach()
    if not audited(audit.every if audit else 0, worker.weights.version):
        _flip(weight)
        return
    assert audit is not None
    compare = audit.compare

    def compare_flipped(version: int, fused: bool, plain: bool) -> None:
        audit.compare = compare  # type: ignore[method-assign]
        _flip(weight)
        compare(version, fused, plain)

    audit.compare = compare_flipped  # type: ignore[method-assign]


def _flip(tensor: Tensor) -> None:
    """The highest bit of the first number's mantissa, in float32 and smaller."""
    size = tensor.element_size()
    number = tensor[(0,) * tensor.dim()].view({2: torch.int16, 4: torch.int32, 8: torch.int64}[size])
    number.bitwise_xor_(1 << (8 * size - 10))


def _fill_disk(worker: StageWorker) -> None:
    """The first file of the checkpoint that is about to be made does not reach the disk; the one before may still be on its way."""
    sync, checkpoint = os.fsync, folder_name(worker.weights.version)

    def full(descriptor: Any) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode) and checkpoint in os.readlink(f"/proc/self/fd/{descriptor}"):
            os.fsync = sync
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    os.fsync = full  # type: ignore[assignment]


def _make_nan(worker: StageWorker) -> None:
    """The next loss."""
    loss_fn = worker.loss_fn

    def spoiled(output: Any, target: Any) -> Any:
        worker.loss_fn = loss_fn
        return tree_map(lambda value: value * float("nan"), loss_fn(output, target))

    worker.loss_fn = spoiled


INJECT: dict[str, Callable[[StageWorker], None]] = {
    "kill": _kill,
    "freeze": _freeze,
    "flip_gradient": _flip_gradient,
    "flip_weights": _flip_weights,
    "disk": _fill_disk,
    "nan": _make_nan,
}
"""kind -> what is done to the process in which a stage lives."""
