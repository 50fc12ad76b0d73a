"""A part of the store that is new in every attempt of torchrun.

torchrun keeps the store between attempts (``--max-restarts``), so the processes of the next one would find the addresses and the notes of
those that have died. The number of the attempt is no name for the new part: agents of several machines count their own restarts only. So
the first process makes up a name, and gives it to those that answer its call with a word that they have made up::

    process 0    call = N                          all answers to N are there:  given/N = [1: a, 2: b]
    process 1             reads N: answer/N/1 = a                                    a is mine: the part is N

A process that reads the call of a dead attempt finds the words of the dead under it, if anything, and looks at the call again.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from datetime import timedelta

from torch.distributed import DistError
from torch.distributed import distributed_c10d as c10d
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from pipeoptim.engine.processes.rendezvous import innermost
from pipeoptim.errors import ConfigError, StageFailure, first_line

_WHERE = "pipeoptim/attempts"
_PROBE = "pipeoptim/probe"
_PAUSE = 0.01  # seconds between looks


def fresh_rendezvous(timeout: float) -> tuple[Store, int, int]:
    """A part of the store that torchrun's variables name, for the processes that run now; the rank of this one, and how many they are.

    Args:
        timeout: seconds to wait for the others.

    Raises:
        ConfigError: the variables are missing or wrong.
        StageFailure: a process did not come in time.
    """
    try:
        store, rank, world_size = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
        return fresh_store(store, rank, world_size, timeout), rank, world_size
    except ValueError as error:
        raise ConfigError(f"the processes do not know of each other ({error}); start them with torchrun") from error
    except DistError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise StageFailure(
            f"the processes did not meet at {where} ({first_line(error)}); start all of them with this address"
        ) from error


def fresh_store(store: Store, rank: int, world_size: int, timeout: float) -> Store:
    """A part of ``store`` for the processes that run now; all of them call this.

    Args:
        timeout: seconds to wait for the others.

    Raises:
        StageFailure: one did not come in time.
    """
    calls, end = PrefixStore(_WHERE, store), time.monotonic() + timeout
    name = _call(calls, world_size, end) if rank == 0 else _answer(calls, rank, end)
    return PrefixStore(f"{_WHERE}/{name}", store)


def _call(calls: Store, world_size: int, end: float) -> str:
    name = uuid.uuid4().hex
    calls.set("call", name)
    answers = {rank: f"answer/{name}/{rank}" for rank in range(1, world_size)}
    for rank, key in answers.items():
        while not calls.check([key]):
            _wait(end, f"process {rank}")
    calls.set(f"given/{name}", json.dumps({rank: calls.get(key).decode() for rank, key in answers.items()}))
    return name


def _answer(calls: Store, rank: int, end: float) -> str:
    word = uuid.uuid4().hex
    while True:
        if calls.check(["call"]):
            name = calls.get("call").decode()
            calls.set(f"answer/{name}/{rank}", word)
            if calls.check([f"given/{name}"]) and json.loads(calls.get(f"given/{name}")).get(str(rank)) == word:
                return name
        _wait(end, "process 0")


def _wait(end: float, who: str) -> None:
    if time.monotonic() > end:
        raise StageFailure(f"{who} did not come in time to begin this attempt")
    time.sleep(_PAUSE)


def refuse_kept_store() -> None:
    """Raises ConfigError where torchrun would restart these processes, and their default group could not be made again then."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0)
    store = c10d._get_default_store()
    if not restarts or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or not isinstance(store, PrefixStore):
        return
    store.set(_PROBE, "")
    # So it is called in every attempt where torch has made the group from the variables of torchrun.
    by_torch = f"default_pg/{c10d._get_default_group().group_name}//{_PROBE}"
    if innermost(store).check([by_torch]):
        raise ConfigError(
            f"torchrun would restart these processes up to {restarts} times, but keeps its store, in which the next attempt would find the "
            "addresses of the dead; call pipeoptim.init_process_group() in place of torch.distributed's"
        )
