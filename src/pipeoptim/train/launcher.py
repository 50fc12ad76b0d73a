"""Starts the processes of the stages with torch's elastic agent (which torchrun runs as well) and reports how they ended.

Ctrl-C reaches the agent, which passes it on to the workers and waits for them: they stop cleanly and save. A second
Ctrl-C makes it terminate them. Signals of schedulers are passed on by :mod:`~pipeoptim.train.passed_signals`.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from pipeoptim.config import TrainConfig
from pipeoptim.engine.processes.loopback import gloo_on_loopback
from pipeoptim.errors import ConfigError, DivergedError, PipeOptimError, StageFailure
from pipeoptim.kernels import available
from pipeoptim.train import local_rendezvous
from pipeoptim.train.layout import processes_of
from pipeoptim.train.nodes import ALONE, AnotherNode, FirstNode, NoOthers
from pipeoptim.train.parent import LAUNCHER
from pipeoptim.train.passed_signals import passed_on
from pipeoptim.train.result import RunResult
from pipeoptim.train.rundir import RunDir, Start
from pipeoptim.train.signals import AbortedError, StopSignals
from pipeoptim.train.stage_logs import StageLogs
from pipeoptim.train.stopped_workers import stopped_workers_end
from pipeoptim.train.supervised import check_shared, first_attempt_of, supervise

#: Seconds that a clean stop may take after Ctrl-C, before the agent kills the workers.
STOP_SECONDS = 120


def launch(
    run: RunDir, config: TrainConfig, start: Start, stop: StopSignals, quiet: bool, nodes: FirstNode | NoOthers = ALONE
) -> RunResult:
    """Run ``config`` from ``start`` in as many processes as its layout has, on this machine; returns when all have ended.

    ``stop``: the signals that are passed on to them. ``nodes``: other machines, which have a part of the processes, with ``survive``.

    Raises:
        StageFailure: a stage failed; the message names it and says why.
        DivergedError: a weight is not finite.
        ConfigError: a stage found the configuration impossible.
        AbortedError: aborted before it could save.
    """
    layout = processes_of(config)
    logs = StageLogs(_next_folder(run.logs), layout)
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=layout.processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend=local_rendezvous.register(),
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=logs,
        local_addr="localhost",
        signals_to_handle="SIGINT,SIGHUP,SIGQUIT",
        shutdown_timeout=STOP_SECONDS,
    )
    # What is there afterwards was written by this session.
    run.result.unlink(missing_ok=True)
    command, inherited = _command(run, config, start.checkpoint, quiet), _inherited(config)
    if config.survive:
        with _environment(**inherited), nodes.attempt():
            logs.folder.mkdir(parents=True, exist_ok=True)
            attempt, store = first_attempt_of(nodes, logs.folder, start.checkpoint, run.config_digest())
            nodes.begin(attempt)
            supervise(attempt, run, logs, command, stop, nodes, partial(_reported, logs, run, stop))
        del store  # here, as other nodes may have read in it until now
        return RunResult.read(run.path)
    with (
        _environment(**inherited),
        _silent_agent(),
        _signals_restored(),
        stopped_workers_end(),
        passed_on(stop, map(logs.err, range(layout.processes))),
    ):
        try:
            elastic_launch(settings, sys.executable)(*command)
        except ChildFailedError as error:
            raise _reported(logs, run, stop, error.failures) from error
        except SignalException as error:
            if not run.result.exists():
                raise AbortedError(f"aborted by {error.sigval.name}; {run.how_to_resume()}", error.sigval) from error
    return RunResult.read(run.path)


def join_launches(run: RunDir, config: TrainConfig, stop: StopSignals, quiet: bool, nodes: AnotherNode) -> RunResult:
    """As :func:`launch` for the stages of a node that is not the first, for each attempt of node 0.

    Raises:
        PipeOptimError: as the run has ended.
    """
    layout = processes_of(config)
    while (attempt := nodes.next_attempt()) is not None:
        with suppress(PipeOptimError), nodes.attempt():  # node 0 decides whether the run is over
            check_shared(run, attempt, nodes)
            logs = StageLogs(run.logs / attempt.logs, layout)
            checkpoint = run.checkpoints / attempt.checkpoint if attempt.checkpoint else None
            with _environment(**_inherited(config)):
                command = _command(run, config, checkpoint, quiet)
                supervise(attempt, run, logs, command, stop, nodes, partial(_reported, logs, run, stop))
    return RunResult.read(run.path)


def _command(run: RunDir, config: TrainConfig, checkpoint: Path | None, quiet: bool) -> list[str]:
    arguments = ["-m", "pipeoptim.train.worker", str(run.path), "--from", str(checkpoint or "")]
    arguments += ["--config-sha256", run.config_digest()]
    arguments += ["--stop-signals", config.stop_signals, "--grace", str(config.grace)]
    return [*arguments, *(["--quiet"] if quiet else [])]


def _inherited(config: TrainConfig) -> dict[str, str]:
    """Variables that workers get."""
    found = {"OMP_NUM_THREADS": str(config.threads), LAUNCHER: str(os.getpid()), **gloo_on_loopback()}
    if not available():  # this process has warned already; the workers would only repeat it in their logs
        found["PIPEOPTIM_KERNELS"] = "0"
    return found


def _next_folder(logs: Path) -> Path:
    return logs / f"launch-{1 + len(list(logs.glob('launch-*')))}"


def _reported(logs: StageLogs, run: RunDir, stop: StopSignals, failures: Mapping[int, ProcessFailure]) -> PipeOptimError:
    """What a run tells that ended by ``failures``; one that was asked to stop was aborted by them."""
    failure = _first_failure(failures, logs)
    return AbortedError(f"{stop.name} came, and {failure}; {run.how_to_resume()}", stop.number) if stop.wanted else failure


def _first_failure(failures: Mapping[int, ProcessFailure], logs: StageLogs) -> PipeOptimError:
    """The error of the stage that failed first, rather than of those that the agent ended or that failed because of a peer."""
    told = {k: _reason(failure, logs.err(k)) for k, failure in failures.items()}

    def order(k: int) -> tuple[bool, bool, int]:
        # Last those that the agent ended, before them those that blame a peer; else the first in time.
        return failures[k].exitcode == -signal.SIGTERM, told[k].startswith("StageFailure"), failures[k].timestamp

    rank = min(failures, key=order)
    kind, colon, text = told[rank].partition(": ")
    if kind == "ConfigError":
        return ConfigError(text)
    if kind == "StageFailure":  # it names another stage, which failed first
        cause = text.removeprefix("first failure: ")
        return StageFailure(f"{cause} (seen by {logs.layout.name(rank)}, log: {logs.err(rank)})")
    if kind == "DivergedError" and text.startswith("the weights"):  # found by all together, and it names the stage itself
        return DivergedError(text)
    reason = (
        text if colon and kind in ("DivergedError", "CorruptionError", "CheckpointWriteError", "PipeOptimError") else told[rank]
    )
    return StageFailure(f"{logs.layout.name(rank)} failed: {reason} (log: {logs.err(rank)})")


def _reason(failure: ProcessFailure, log: str) -> str:
    """The reason in one line: an exception leaves a file, a signal is in the exit code, anything else is the last line of the log."""
    message: Any = failure.message
    if isinstance(message, dict):
        return _first_line(str(message.get("message", "")))
    if failure.exitcode < 0:
        return f"killed by {failure.signal_name()}"
    try:
        last = Path(log).read_text(errors="replace").strip().splitlines()[-1]
    except (OSError, IndexError):
        last = ""
    if not last and not shutil.disk_usage(Path(log).parent).free:
        return "no space left on device"  # not even for its log
    return last or f"exit code {failure.exitcode}"


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[0]


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """What the workers inherit."""
    before = {name: os.environ.get(name) for name in [*values, "TORCHELASTIC_SIGNALS_TO_HANDLE"]}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _silent_agent() -> Iterator[None]:
    """Mute the agent's own log: users get one sentence from us instead."""

    loggers = [
        logging.getLogger(name) for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")
    ]
    for logger in loggers:
        logger.addFilter(_drop_record)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_drop_record)


def _drop_record(_: logging.LogRecord) -> bool:
    return False


@contextmanager
def _signals_restored() -> Iterator[None]:
    """The agent installs signal handlers and leaves them; put the caller's back."""
    names = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {name: signal.getsignal(name) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            if handler is not None and signal.getsignal(name) is not handler:
                signal.signal(name, handler)
