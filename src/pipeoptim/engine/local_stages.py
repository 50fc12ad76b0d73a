"""The stages of a pipeline that live in this process, and what users can ask of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pipeoptim.engine.effects import check_effects, planned
from pipeoptim.engine.runner import StageRunner
from pipeoptim.engine.stage.prediction_monitor import PredictionError
from pipeoptim.engine.stage.worker import StageWorker
from pipeoptim.engine.stage_times import StageTimes
from pipeoptim.engine.trace import TraceRow
from pipeoptim.errors import ConfigError
from pipeoptim.methods import copies, refresh_every
from pipeoptim.options import PipelineOptions
from pipeoptim.options.checks import count
from pipeoptim.schedule import Program, Slack


class LocalStages:
    """The part of a pipeline that only answers: nothing here carries out an action.

    Attributes:
        method: what runs.
        options: all that it was given, by keyword or not.
        depth, microbatches: D and M.
        program: the action program of all stages.
        trace: records what the stages do; None where none was given.
    """

    def __init__(self, options: PipelineOptions, depth: int, processes: int | None = None) -> None:
        self.options, self._asked_processes = options, processes
        # Before anything is made: an option that could not take effect is refused, not ignored.
        self.method, self.program = planned(options, depth, processes)
        self.depth, self.microbatches, self.trace = depth, options.microbatches, options.trace
        self._runners: dict[int, StageRunner] = {}  # of the stages that live here, in order

    def check_microbatches(self, m: int) -> None:
        """Raises ConfigError where M could not be changed to ``m``, now or in the middle of a run."""
        m = count("microbatches", m)
        if m != self.microbatches:
            self._program_with(m)

    def _program_with(self, microbatches: int, slack: Slack | None = None) -> Program:
        """The action program with another number of micro-batches, or another slack.

        Raises:
            ConfigError: the method, or an option, does not work with it.
        """
        if self.trace is not None and microbatches != self.microbatches:
            raise ConfigError(
                "a trace numbers micro-batches by their place in mini-batches of one size; leave trace out to change M"
            )
        options = self.options
        slack = self.program.slack if slack is None else slack
        program = self.method.program(self.depth, microbatches, self._asked_processes, options.overlap, slack)
        check_effects(options, self.method, program)
        for runner in self._runners.values():
            runner.worker.check_program(program)
        return program

    def _use_program(self, program: Program) -> None:
        """Go over to ``program``; nothing is in flight."""
        self.program, self.microbatches = program, program.microbatches
        for runner in self._runners.values():
            runner.worker.use_program(program)

    @property
    def slack(self) -> Slack:
        """What is in force: that of the options, or with ``slack="auto"`` what was chosen, 0 until then."""
        return self.program.slack

    @property
    def local_stages(self) -> list[int]:
        """The stages that live in this process."""
        return sorted(self._runners)

    def stage_module(self, k: int) -> nn.Module:
        """The module of stage ``k``, with the latest weights."""
        return self._worker(k).module

    def stage_worker(self, k: int) -> StageWorker:
        """All of stage ``k``, for code that saves or observes it from outside."""
        return self._worker(k)

    def version(self, k: int) -> int:
        """Updates that stage ``k`` has applied."""
        return self._worker(k).weights.version

    def version_gap(self, k: int, microbatch: int = 0) -> int:
        """Updates of stage ``k`` between F and B of micro-batch ``microbatch`` of a mini-batch, in steady state."""
        if isinstance(microbatch, bool) or not isinstance(microbatch, int) or not 0 <= microbatch < self.microbatches:
            raise ConfigError(f"microbatch is {microbatch!r}, must be one of a mini-batch's: 0 .. {self.microbatches - 1}")
        return self.program.steady_gap(k, microbatch)

    def weight_copies(self, k: int) -> int:
        """Copies of its weights that stage ``k`` holds at most, the latest included: what the method promises."""
        self.program.check_stage(k)
        refresh = refresh_every(self.options.prediction, self.options.refresh)
        keeps = self.options.recompute == "forward"
        return copies(self.method, self.depth, self.microbatches, k, keeps, self.program, refresh)

    def weight_bytes(self, k: int) -> int:
        """Bytes of memory that hold weights of stage ``k`` now, every copy included: measured, by walking storages."""
        return self._worker(k).weight_bytes()

    def stage_times(self, k: int) -> StageTimes | None:
        """How long stage ``k`` computed and waited per mini-batch, lately; None in the first mini-batches."""
        self._worker(k)
        return self._runners[k].clock.times(k)

    def restart_stage_times(self) -> None:
        """Measure from now on: mini-batches have another size, so that stages take another time for them."""
        for runner in self._runners.values():
            runner.clock.begin_anew()

    @property
    def loss_parts(self) -> dict[str, Tensor]:
        """Means over the mini-batch trained on last, or else the batch evaluated last, by name: what ``loss_fn`` returned besides the
        loss (last stage), and what the stages that live here raised by :func:`pipeoptim.add_loss` in training."""
        found: dict[str, Tensor] = {}
        for runner in self._runners.values():
            for name, value in runner.worker.losses.means().items():
                # The same name on several stages adds up, as within a stage.
                found[name] = found[name] + value if name in found else value
        return found

    def grad_norm(self, k: int) -> float | None:
        """The norm by which the newest update of stage ``k`` was clipped; None before the first, and without ``clip``."""
        clipper = self._worker(k).clipper
        return None if clipper is None or clipper.used is None else float(clipper.used)

    def clipped_tensors(self, k: int) -> int | None:
        """How many tensors of stage ``k`` were scaled by :class:`~pipeoptim.AdaGC`, in all updates together; None under other clipping."""
        clipper = self._worker(k).clipper
        return None if clipper is None else clipper.scaled_tensors

    def leave_out(self, mini_batches: Iterable[int]) -> None:
        """Make no update for these mini-batches, counted from 0, on any stage, whatever their loss is; replaces those of earlier calls.

        For a run that has found them bad, and has gone back to an earlier state (see ``on_bad``). With several processes all of them
        call it; the last stage tells the others.

        Raises:
            ConfigError: with ``on_bad="stop"``, which takes no precautions against what such mini-batches compute; or no numbers.
        """
        found = list(mini_batches) if isinstance(mini_batches, Iterable) else [mini_batches]
        if isinstance(mini_batches, str | int) or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in found):
            raise ConfigError(f"mini_batches is {found!r}, must be numbers of mini-batches, counted from 0")
        if found and self.options.on_bad == "stop":
            raise ConfigError(
                "leave_out needs on_bad='skip' or 'rollback', which keep what is not finite out of buffers and predictions"
            )
        for runner in self._runners.values():
            runner.worker.finite.left_out = frozenset(found)

    def skipped(self, k: int) -> list[int]:
        """The mini-batches, counted from 0, whose update stage ``k`` has left out (see ``on_bad``)."""
        return list(self._worker(k).finite.skipped)

    def prediction_error(self, k: int) -> list[PredictionError]:
        """The newest measurement of each parameter group of stage ``k``.

        Empty without ``monitor``, before the first, and where nothing is predicted (``pipeoptim``'s last stage).
        """
        monitor = self._worker(k).monitor
        return [] if monitor is None else monitor.figures()

    def prediction_scales(self, k: int) -> list[float]:
        """The factor on the predictions of each parameter group of stage ``k``, as it is now (see ``scale``).

        Empty where nothing is predicted, or not by the optimizer's rule.
        """
        return list(self._worker(k).prediction_scales())

    def stage_state_dict(self, k: int) -> dict[str, Any]:
        """Everything that stage ``k`` needs to continue bit for bit: tensors (not copied) and plain data.

        Raises:
            PipeOptimError: micro-batches are in flight; call :meth:`drain` first.
        """
        return self._worker(k).state_dict()

    def _trace_row(self, k: int, device: torch.device) -> TraceRow | None:
        """Where the trace records stage ``k``."""
        return None if self.trace is None else self.trace.row(k, self.program, self.method.name, device)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ConfigError(
            "a pipeline cannot be copied or pickled: it holds what its modules, optimizers and neighbours hold as well; keep "
            "stage_state_dict(k) of every stage, and load it into a new pipeline"
        )

    def _worker(self, k: int) -> StageWorker:
        if isinstance(k, bool) or not isinstance(k, int):
            raise ConfigError(f"k is {k!r}, must be the number of a stage, one of {self.local_stages}")
        if k not in self._runners:
            where = f"stages 0 .. {self.depth - 1} exist" if not 0 <= k < self.depth else f"here live {self.local_stages}"
            raise ConfigError(f"stage {k} does not live in this process; {where}")
        return self._runners[k].worker
