"""``run`` takes a configuration and a directory and returns a result; ``pipeoptim train`` and scripts call it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch import nn

from pipeoptim.checkpoint.write_checkpoint import CheckpointWriteError
from pipeoptim.config import TrainConfig, read_signals
from pipeoptim.errors import ConfigError, CorruptionError, DivergedError, PipeOptimError, StageFailure
from pipeoptim.files import cause_of
from pipeoptim.schedule import AUTO
from pipeoptim.telemetry.metrics import read_rows
from pipeoptim.telemetry.plots import loss_curve
from pipeoptim.train import rundir
from pipeoptim.train.automatic import kept, settled
from pipeoptim.train.callbacks import Callback
from pipeoptim.train.checks import check
from pipeoptim.train.engines import make_emulator
from pipeoptim.train.evaluate import ObservedLoss
from pipeoptim.train.group import SingleProcessGroup
from pipeoptim.train.launcher import join_launches, launch
from pipeoptim.train.layout import layout_of
from pipeoptim.train.lock import locked
from pipeoptim.train.node import Node
from pipeoptim.train.nodes import ALONE, AnotherNode, FirstNode, NoOthers
from pipeoptim.train.restarts import with_restarts
from pipeoptim.train.result import RunResult
from pipeoptim.train.rollback import with_rollbacks
from pipeoptim.train.rundir import FinishedError, RunDir, Start
from pipeoptim.train.session import run_session
from pipeoptim.train.setup import RunSetup, build_setup, cpu_threads, probe_setup
from pipeoptim.train.signals import AbortedError, StopSignals
from pipeoptim.train.worker import first_of_run, join, reports, under_torchrun


def run(
    config: TrainConfig,
    run_dir: Path | str,
    resume: bool | None = False,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
    node: Node | None = None,
) -> RunResult:
    """Train as ``config`` says, in ``run_dir``; see :func:`pipeoptim.train.run`."""
    directory = RunDir(Path(run_dir))
    if config.method == AUTO:
        begun = resume is not False and directory.config.exists()
        config = kept(config, directory.read_config()) if begun else settled(config)
    check(config)
    if node is not None:
        _check_node(config, node)
    launched = config.engine == "processes" or config.max_restarts or config.on_bad == "rollback"
    if callbacks and (launched or under_torchrun()):
        raise ConfigError(
            f"callbacks holds {callbacks[0]!r}, an object of this process, but engine is {config.engine!r} with "
            f"{config.max_restarts} restarts and on_bad {config.on_bad!r}, where processes are started that make their own; name its class "
            "in the settings, as callbacks='module:Class(option=value)'"
        )
    if not config.checksums and not under_torchrun():
        raise ConfigError(
            "checksums is False, but without torchrun all processes are on this machine, where messages carry none; leave --no-checksums "
            "out"
        )
    train = _joined if under_torchrun() else _launched if launched else _emulated
    if node is not None:
        train = _on_first_node if node.rank == 0 else _on_another_node
    with ExitStack() as held:
        stop = held.enter_context(
            StopSignals(read_signals(config.stop_signals), config.grace, first_of_run(), directory.resume_command)
        )
        # The lock is taken inside and released here, after result and curve are written.
        result = train(
            config, _Beginning(directory, resume, held, stop, callbacks=tuple(callbacks), node=node), quiet=not progress
        )
        if reports(config) and (node is None or node.rank == 0):
            _draw_curve(directory, config)
    return result


def check_possible(config: TrainConfig) -> None:
    """Check all that a run checks before it begins.

    Raises:
        ConfigError: one sentence with the value, the reason and the remedy.
    """
    check(config)
    with cpu_threads(config.threads):
        probe_setup(build_setup(config))


def _draw_curve(directory: RunDir, config: TrainConfig) -> None:
    loss_curve(
        read_rows(directory.metrics), directory.curve, f"{directory.path.name}: {config.method}, {layout_of(config).describe()}"
    )


class FileFailure(PipeOptimError, OSError):
    """A file of a run or of its data could not be read or written, for instance because the disk is full."""


@dataclass(frozen=True)
class _Beginning:
    """How a session comes to own its directory.

    Args:
        resume: True to continue a run, False to begin one; None to begin it or continue it, whichever there is to do.
        held: keeps the directory's lock until the session ends.
        stop: what signals wish.
        stages: filled where the run may start again by itself, with modules that know the names of its parameters.
        callbacks: objects that were given beside those that the configuration names.
        node: this machine, where there are others.
    """

    directory: RunDir
    resume: bool | None
    held: ExitStack
    stop: StopSignals
    stages: list[nn.Module] = field(default_factory=list)
    callbacks: tuple[Callback, ...] = ()
    node: Node | None = None

    @property
    def name(self) -> str:
        """Of the run."""
        return self.directory.path.absolute().name

    def look(self, config: TrainConfig) -> None:
        """Refuse what can be refused before anything is built."""
        # `create` checks it again; here it spares the user the wait for data and model.
        if self.resume is False:
            self.directory.check_new()
        elif self.directory.config.exists():
            rundir.check_longer(config, self.directory.read_config())

    def start(self, setup: RunSetup) -> Start:
        """The last thing before work starts, and the first that writes."""
        directory, config = self.directory, setup.config
        if config.max_restarts or config.on_bad == "rollback":
            self.stages[:] = setup.stages
        if self.resume is False or (self.resume is None and not directory.path.exists()):
            begun = rundir.begin(directory, config)
            self.held.enter_context(locked(directory.path))
            return begun
        directory.read_config()  # where there is no run, no lock is left behind
        self.held.enter_context(locked(directory.path))
        try:
            return rundir.resume(directory, config, _say, setup.stages, anew=self.resume is None)
        except FinishedError:
            if not directory.curve.exists():
                _draw_curve(directory, config)
            raise

    def start_again(self, config: TrainConfig) -> Start:
        """After a failure of the run's processes."""
        directory = self.directory
        return rundir.resume(directory, config, _say, self.stages, anew=not any(directory.checkpoints.glob("step-*")))


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _emulated(config: TrainConfig, beginning: _Beginning, quiet: bool) -> RunResult:
    directory = beginning.directory
    with cpu_threads(config.threads):
        beginning.look(config)
        setup = build_setup(config, beginning.callbacks).all_here()
        probe_setup(setup)
        loss = ObservedLoss(setup.task)
        pipe, optimizers = make_emulator(setup, loss)
        start = beginning.start(setup)
        try:
            return run_session(directory, setup, pipe, optimizers, loss, SingleProcessGroup(), start, beginning.stop, quiet)
        except KeyboardInterrupt as error:
            raise AbortedError(f"aborted by Ctrl-C; {directory.how_to_resume()}") from error
        except CheckpointWriteError:
            raise
        except OSError as error:
            raise FileFailure(f"run {directory.path} failed: {cause_of(error)}; {directory.how_to_resume()}") from error
        except (DivergedError, CorruptionError) as error:
            raise type(error)(f"{error}; {directory.how_to_resume()}") from error


def _checked_start(config: TrainConfig, beginning: _Beginning) -> Start:
    """As above for a run that is set up in other processes: it is set up here too, once, to see that its parts fit together."""
    with cpu_threads(config.threads):
        beginning.look(config)
        setup = build_setup(config)
        probe_setup(setup)
        make_emulator(setup, setup.task.loss)
        return beginning.start(setup)


def _launched(config: TrainConfig, beginning: _Beginning, quiet: bool, nodes: FirstNode | NoOthers = ALONE) -> RunResult:
    directory, stop = beginning.directory, beginning.stop
    start = _checked_start(config, beginning)
    resume = partial(beginning.start_again, config)
    attempt: Callable[[Start], RunResult] = partial(launch, directory, config, stop=stop, quiet=quiet, nodes=nodes)
    if config.on_bad == "rollback":
        attempt = with_rollbacks(directory, attempt, resume, _say)
    try:
        return with_restarts(config.max_restarts, start, attempt, resume, stop, _say)
    except (StageFailure, DivergedError) as error:
        raise type(error)(f"{error}; {directory.how_to_resume()}") from error


def _check_node(config: TrainConfig, node: Node) -> None:
    if under_torchrun():
        raise ConfigError(
            f"nnodes is {node.count}, but torchrun started this process, and knows the nodes itself; leave --nnodes, --node-rank, "
            "--master-addr and --master-port to torchrun"
        )
    if not config.survive:
        raise ConfigError(
            f"nnodes is {node.count} without survive; start a run on several machines by torchrun (see docs/multi_node.md), or give "
            "--survive K, with which pipeoptim train starts the processes itself, on each machine its own"
        )
    node.check(layout_of(config).processes)


@contextmanager
def _second_interrupt(directory: RunDir) -> Iterator[None]:
    """In words, where no processes run, which would be ended: while nodes wait for each other, or the model is built."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise AbortedError(f"aborted by Ctrl-C; {directory.how_to_resume()}") from error


def _on_first_node(config: TrainConfig, beginning: _Beginning, quiet: bool) -> RunResult:
    assert beginning.node is not None
    first = FirstNode(beginning.node, beginning.name, config, beginning.stop, _say)
    with first as nodes, _second_interrupt(beginning.directory):
        nodes.gather()  # before anything is built or written: they may refuse
        return _launched(config, beginning, quiet, nodes)


def _on_another_node(config: TrainConfig, beginning: _Beginning, quiet: bool) -> RunResult:
    assert beginning.node is not None
    another = AnotherNode(beginning.node, beginning.name, config, beginning.stop, _say)
    with _second_interrupt(beginning.directory), another as nodes:
        return join_launches(beginning.directory, config, beginning.stop, quiet, nodes)


def _joined(config: TrainConfig, beginning: _Beginning, quiet: bool) -> RunResult:
    if config.max_restarts:
        raise ConfigError(
            f"max_restarts is {config.max_restarts}, but under torchrun its agent starts processes again; give --max-restarts to torchrun"
        )
    if config.survive:
        raise ConfigError(
            f"survive is {config.survive}, but torchrun's agent ends all processes when one has died, here and on other machines; leave "
            "torchrun out (pipeoptim train starts the processes itself; on several machines with --nnodes, --node-rank, --master-addr and "
            "--master-port), or leave survive out and give --max-restarts to torchrun"
        )
    if config.engine != "processes":
        raise ConfigError(
            "torchrun started several processes, but engine is 'emulator'; use --engine processes, or leave torchrun out"
        )
    return join(config, beginning.directory, partial(_checked_start, config, beginning), beginning.stop, quiet)
