"""One process of a run, with its stages: ``python -m pipeoptim.train.worker RUN_DIR``, started by the launcher.

Under the user's own torchrun, every process is ``pipeoptim train`` itself and enters through :func:`join`.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeoptim.config import read_signals
from pipeoptim.train.parent import end_with_parent, is_supervised
from pipeoptim.train.passed_signals import listening
from pipeoptim.train.signals import StopSignals

if TYPE_CHECKING:
    from pipeoptim.config import TrainConfig
    from pipeoptim.engine.processes.opened_sockets import OpenedSockets
    from pipeoptim.train.result import RunResult
    from pipeoptim.train.rundir import RunDir, Start


def read_arguments(arguments: list[str]) -> argparse.Namespace:
    """What the launcher says; without torch, so that signals are heeded as soon as possible."""
    parser = argparse.ArgumentParser(prog="pipeoptim.train.worker")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--from", dest="checkpoint", default="")
    parser.add_argument("--config-sha256", required=True)
    parser.add_argument("--stop-signals", default="")
    parser.add_argument("--grace", type=int, default=30)
    parser.add_argument("--quiet", action="store_true")
    return parser.parse_args(arguments)


def main(options: argparse.Namespace, stop: StopSignals) -> None:
    """Train the stages that the environment variable RANK says."""
    from torch.distributed.elastic.multiprocessing.errors import record

    from pipeoptim.kernels.allocation import keep_freed_memory
    from pipeoptim.train.rundir import RunDir

    keep_freed_memory()
    run = RunDir(options.run_dir)

    def work() -> None:
        from pipeoptim.errors import ConfigError, CorruptionError

        if run.config_digest() != options.config_sha256:  # the launcher has looked at what it names
            raise ConfigError(f"{run.config} was changed while the run was starting; start again")
        config, start = run.read_config(), start_at(options.checkpoint)
        if config.engine == "emulator":
            train_emulated(run, config, start, stop, options.quiet)
            return
        with process_group() as sockets:
            try:
                train_stage(run, config, start, stop, sockets, options.quiet)
            except CorruptionError as error:
                if not is_supervised():
                    raise
                # Unlike other errors it does not come again, so that the image of this process can take over, as after any death.
                print(error, file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)

    # Writes the exception to the agent's error file, from which the launcher takes its sentence.
    record(work)()


def start_at(checkpoint: str) -> Start:
    """The start that a checkpoint's folder (or an empty string) stands for."""
    from pipeoptim.checkpoint import read_meta
    from pipeoptim.train.rundir import Start

    return Start(read_meta(Path(checkpoint)).step, Path(checkpoint)) if checkpoint else Start()


@contextmanager
def process_group() -> Iterator[OpenedSockets]:
    """The default process group: on gloo, or, where a supervisor replaces processes that die, one that nothing is sent through.

    Its connections are those that are opened in blocks of what this returns.
    """
    import torch.distributed as dist
    from torch.distributed.constants import default_pg_timeout

    from pipeoptim.engine.processes.fresh_store import fresh_rendezvous
    from pipeoptim.engine.processes.named_group import init_named_group
    from pipeoptim.engine.processes.opened_sockets import OpenedSockets
    from pipeoptim.engine.processes.rendezvous import port_of

    own, rank, world = fresh_rendezvous(default_pg_timeout.total_seconds())
    sockets = OpenedSockets(port_of(own))
    if is_supervised():
        init_named_group(own, rank, world)
    else:
        with sockets:
            dist.init_process_group("gloo", store=own, rank=rank, world_size=world)
    yield sockets  # not destroyed after a failure, which could wait for a dead peer
    dist.destroy_process_group()


def train_stage(
    run: RunDir, config: TrainConfig, start: Start, stop: StopSignals, sockets: OpenedSockets, quiet: bool
) -> RunResult:
    """Train this process's stages of ``config``; the process group exists, with the connections ``sockets``."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from pipeoptim.train.engines import make_schedule
    from pipeoptim.train.evaluate import ObservedLoss
    from pipeoptim.train.group import DistributedGroup, ReplaceableGroup
    from pipeoptim.train.layout import layout_of
    from pipeoptim.train.session import run_session
    from pipeoptim.train.setup import build_setup, cpu_threads

    layout = layout_of(config)
    replica, stages = layout.place(dist.get_rank())
    mesh = None
    if layout.replicas > 1:
        with sockets:
            mesh = init_device_mesh("cpu", (layout.replicas, layout.width), mesh_dim_names=("data", "pipe"))
    with cpu_threads(config.threads):
        setup = build_setup(config).local_to(replica, stages)
        loss = ObservedLoss(setup.task)
        pipe, optimizers = make_schedule(setup, stages, loss, mesh)
        if config.survive and pipe.rendezvous is not None:
            group: DistributedGroup = ReplaceableGroup(layout, pipe.rendezvous)
        else:
            replicas = None if mesh is None else mesh["data"].get_group()
            group = DistributedGroup(layout, partial(pipe.meeting, sockets), replicas)
        result = run_session(run, setup, pipe, optimizers, loss, group, start, stop, quiet)
        pipe.close()
    return result


def train_emulated(run: RunDir, config: TrainConfig, start: Start, stop: StopSignals, quiet: bool) -> RunResult:
    """Train all stages of ``config`` in this process."""
    from pipeoptim.train.engines import make_emulator
    from pipeoptim.train.evaluate import ObservedLoss
    from pipeoptim.train.group import SingleProcessGroup
    from pipeoptim.train.session import run_session
    from pipeoptim.train.setup import build_setup, cpu_threads

    with cpu_threads(config.threads):
        setup = build_setup(config).all_here()
        loss = ObservedLoss(setup.task)
        pipe, optimizers = make_emulator(setup, loss)
        return run_session(run, setup, pipe, optimizers, loss, SingleProcessGroup(), start, stop, quiet)


def under_torchrun() -> bool:
    """Whether torchrun (or another launcher that sets its variables) started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def reports(config: TrainConfig) -> bool:
    """Whether this process is the one that shows the result (the last stage's, which has the figures)."""
    from pipeoptim.train.layout import layout_of

    return not under_torchrun() or os.environ["RANK"] == str(layout_of(config).reporter)


def first_of_run() -> bool:
    """Whether this process is the only one of its run, or that of stage 0."""
    return os.environ.get("RANK", "0") == "0"


def join(config: TrainConfig, run: RunDir, prepare: Callable[[], Start], stop: StopSignals, quiet: bool) -> RunResult:
    """Train as one process of the user's own torchrun. Stage 0 makes or checks the run directory, for all.

    Raises:
        ConfigError: the number of processes is not that of the layout, or stage 0 refused the run.
    """
    import torch.distributed as dist

    from pipeoptim.engine.processes.collectives import broadcast_plain
    from pipeoptim.errors import ConfigError
    from pipeoptim.train.layout import layout_of
    from pipeoptim.train.rundir import FinishedError, Start

    world, layout = int(os.environ["WORLD_SIZE"]), layout_of(config)
    if world != layout.processes:
        raise ConfigError(
            f"torchrun started {world} processes, but the run has {layout.describe()}; start {layout.processes} processes"
        )
    with process_group() as sockets:
        start, refusal, finished = Start(), "", False
        if dist.get_rank() == 0:
            try:
                start = prepare()
            except ConfigError as error:
                refusal, finished = str(error), isinstance(error, FinishedError)
        refusal, finished, step, checkpoint = broadcast_plain(
            (refusal, finished, start.step, str(start.checkpoint or "")), source=0
        )
        if not refusal:
            return train_stage(run, config, Start(step, Path(checkpoint) if checkpoint else None), stop, sockets, quiet)
    # After the group was destroyed, which all do: a process that ends with the threads of a group alive may be aborted.
    raise FinishedError(refusal) if finished else ConfigError(refusal)


if __name__ == "__main__":
    end_with_parent()
    given = read_arguments(sys.argv[1:])
    # Every process heeds the signals, for a scheduler may send them to one or to all; a second Ctrl-C is for stage 0 alone.
    with StopSignals(read_signals(given.stop_signals), given.grace, aborts=first_of_run() and not is_supervised()) as asked:
        if is_supervised():
            asked.leave_to_others()  # an image of this process would not have the thread that watches the grace time
        print(listening(os.environ.get("RANK")), file=sys.stderr, flush=True)
        main(given, asked)
        if (
            is_supervised()
        ):  # by its default action a signal would end it, and its image would do the end again without the others
            asked.ignore_from_now()
