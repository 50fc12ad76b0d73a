"""A launch whose processes are replaced when they die, on one machine or, with a supervisor on each, on several."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from pipeoptim.checkpoint import unfinished_checkpoints
from pipeoptim.engine.processes.loopback import served_store, store_environment
from pipeoptim.engine.processes.nodes import ADDRESSES
from pipeoptim.errors import ConfigError, PipeOptimError
from pipeoptim.train.nodes import AnotherNode, Attempt, FirstNode, NoOthers, OtherNodes
from pipeoptim.train.parent import SUPERVISED
from pipeoptim.train.rundir import RunDir
from pipeoptim.train.signals import AbortedError, StopSignals
from pipeoptim.train.stage_logs import StageLogs
from pipeoptim.train.supervisor import Supervisor

_SHARED = 10.0  # seconds after which what node 0 has written must be seen here

Reported = Callable[[Mapping[int, ProcessFailure]], PipeOptimError]


def supervise(
    attempt: Attempt,
    run: RunDir,
    logs: StageLogs,
    command: Sequence[str],
    stop: StopSignals,
    nodes: OtherNodes,
    reported: Reported,
) -> None:
    """The processes of this machine, until all processes, also of other nodes, have ended.

    Args:
        run: its directory, which all nodes share.
        logs: where they write; of ``layout.processes`` in all.
        command: arguments of Python.
        stop: signals that are passed on to them.
        nodes: the other machines.

    Raises:
        PipeOptimError: as ``reported`` says of those that failed here, or as another node says.
        AbortedError: a second Ctrl-C.
    """
    layout, node = logs.layout, nodes.node
    world = store_environment(attempt.addresses[0], attempt.port)
    world |= {"WORLD_SIZE": str(layout.processes), SUPERVISED: "1"}
    if node is not None:
        world[ADDRESSES] = ",".join(attempt.addresses)
    ranks = range(layout.processes) if node is None else node.ranks(layout.processes)
    environments = {rank: {**world, "RANK": str(rank)} for rank in ranks}
    files = logs.reify(environments)
    began = time.time()
    # Images have no threads, so the grace time is watched here; with this process, all others end.
    stop.others_save = lambda: any(folder.stat().st_mtime >= began for folder in unfinished_checkpoints(run.checkpoints))
    names = [layout.name(rank) for rank in range(layout.processes)]
    listing = "processes.json" if node is None or node.rank == 0 else f"processes-node-{node.rank}.json"
    try:
        with Supervisor(names, logs.folder / listing) as supervisor:
            supervisor.start(command, environments, files.stdouts, files.stderrs)
            ended = supervisor.run(stop, nodes.look)
    except KeyboardInterrupt:
        raise AbortedError(f"aborted by {stop.name}; {run.how_to_resume()}", stop.number) from None
    if ended:
        raise reported({k: ProcessFailure(k, 0, code, files.error_files[k]) for k, code in ended.items()})


def first_attempt_of(nodes: FirstNode | NoOthers, logs: Path, checkpoint: Path | None, digest: str) -> tuple[Attempt, TCPStore]:
    """What this launch is, for all nodes, and the store that node 0 serves as long as it holds it."""
    nodes.gather()
    store = served_store(nodes.addresses[0])
    return Attempt(nodes.addresses, store.port, "" if checkpoint is None else checkpoint.name, logs.name, digest), store


def check_shared(run: RunDir, attempt: Attempt, nodes: AnotherNode) -> None:
    """Wait until this node sees the run's configuration as node 0 has written it.

    Raises:
        ConfigError: it does not.
    """
    end = time.monotonic() + _SHARED
    while not run.config.exists() or run.config_digest() != attempt.digest or not (run.logs / attempt.logs).is_dir():
        nodes.look()  # node 0 would take this one for gone
        if time.monotonic() > end:
            seen = "another configuration" if run.config.exists() else "no run"
            raise ConfigError(
                f"there is {seen} in {run.path.absolute()} on {nodes.node.name}, but node 0 has written that of this run; the folder of "
                "the runs (--out) must be one that all machines share, such as an NFS mount"
            )
        time.sleep(0.1)
