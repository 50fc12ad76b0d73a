"""``run``: a configuration and a directory in, a result out. What ``pipeoptim train`` calls, and scripts may."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from pipeoptim.config import TrainConfig
from pipeoptim.errors import ConfigError
from pipeoptim.telemetry.plots import loss_curve
from pipeoptim.train import rundir
from pipeoptim.train.checks import check
from pipeoptim.train.engines import make_emulator
from pipeoptim.train.evaluate import ObservedLoss
from pipeoptim.train.group import SingleProcessGroup
from pipeoptim.train.launcher import launch
from pipeoptim.train.layout import layout_of
from pipeoptim.train.result import RunResult
from pipeoptim.train.rundir import RunDir, Start
from pipeoptim.train.session import run_session
from pipeoptim.train.setup import build_setup, cpu_threads, probe_setup
from pipeoptim.train.signals import AbortedError, StopOnInterrupt
from pipeoptim.train.worker import join, reports, under_torchrun


def run(config: TrainConfig, run_dir: Path | str, resume: bool = False, progress: bool = True) -> RunResult:
    """Train as ``config`` says, in ``run_dir``; see :func:`pipeoptim.train.run`."""
    check(config)
    directory = RunDir(Path(run_dir))
    train = _joined if under_torchrun() else _emulated if config.engine == "emulator" else _launched
    result = train(config, directory, resume, quiet=not progress)
    if reports(config):
        title = f"{directory.path.name}: {config.method}, {layout_of(config).describe()}"
        loss_curve(result.rows(), directory.curve, title)
    return result


def _start(config: TrainConfig, directory: RunDir, resume: bool) -> Start:
    """The last thing before work starts, and the first that writes."""
    if not resume:
        return rundir.begin(directory, config)
    return rundir.resume(directory, config, say=lambda text: print(text, file=sys.stderr))


def _emulated(config: TrainConfig, directory: RunDir, resume: bool, quiet: bool) -> RunResult:
    with cpu_threads(config.threads):
        if not resume:
            directory.check_new()
        setup = build_setup(config)
        probe_setup(setup)
        loss = ObservedLoss(setup.task)
        pipe, optimizers = make_emulator(setup, loss)
        start = _start(setup.config, directory, resume)
        try:
            with StopOnInterrupt() as stop:
                return run_session(directory, setup, pipe, optimizers, loss, SingleProcessGroup(), start, stop, quiet)
        except KeyboardInterrupt as error:
            raise AbortedError(f"aborted by Ctrl-C; {directory.how_to_resume()}") from error


def _checked_start(config: TrainConfig, directory: RunDir, resume: bool) -> Start:
    """As above for a run that is set up in other processes: it is set up here too, once, to see that its parts fit together."""
    with cpu_threads(config.threads):
        if not resume:
            directory.check_new()
        setup = build_setup(config)
        probe_setup(setup)
        make_emulator(setup, setup.task.loss)
        return _start(setup.config, directory, resume)


def _launched(config: TrainConfig, directory: RunDir, resume: bool, quiet: bool) -> RunResult:
    return launch(directory, config, _checked_start(config, directory, resume), quiet)


def _joined(config: TrainConfig, directory: RunDir, resume: bool, quiet: bool) -> RunResult:
    if config.engine != "processes":
        raise ConfigError(
            "torchrun started several processes, but engine is 'emulator'; use --engine processes, or leave torchrun out"
        )
    return join(config, directory, partial(_checked_start, config, directory, resume), quiet)
