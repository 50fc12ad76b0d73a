"""What the commands of several nodes tell each other, so that a run that survives is one run: begins, ends, fails and stops everywhere.

::

    node 0  listens      <-- hello: rank, settings ---   node r         refused where they do not fit
                         --- begin: attempt --------->                  both start the processes of their stages
                         <-- beat, signal ----------->                  for the others as well
                         <-- done / failed: error ----                  or --- stop: reason --->  where another node has failed
                         --- over: error ------------>                  all commands end alike

A connection that ends, or on which nothing comes for the liveness time-out, is a node that is gone. With restarts, node 0 waits until the
same command is given there again.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar

import pipeoptim
from pipeoptim.config import TrainConfig
from pipeoptim.engine.processes.loopback import ADDRESS
from pipeoptim.errors import ConfigError, PipeOptimError, StageFailure
from pipeoptim.train.node import Node
from pipeoptim.train.node_link import NodeLink, as_error, told
from pipeoptim.train.signals import AbortedError, StopSignals

T = TypeVar("T")

JOIN = 600.0
"""Seconds that the nodes wait for each other to begin."""

_HELLO = 10.0  # seconds in which a caller says who it is
_CALLERS = 64  # of those at most
_END = 60.0  # seconds that node 0 waits for the others to have ended their processes
_PAUSE = 0.05


@dataclass(frozen=True)
class Attempt:
    """What node 0 tells the others when all start their processes.

    Args:
        addresses: IP addresses of the nodes.
        port: of the store, on node 0.
        checkpoint: name of the folder from which all start; empty for the beginning.
        logs: name of the folder of this launch.
        digest: of the run's configuration.
    """

    addresses: tuple[str, ...]
    port: int
    checkpoint: str
    logs: str
    digest: str


class OtherNodes(Protocol):
    """The other nodes, for the one that runs here; :class:`NoOthers` where there are none."""

    @property
    def node(self) -> Node | None:
        """This one; None where it is the only one."""
        ...

    def attempt(self) -> AbstractContextManager[None]:
        """In it, this node's processes run; left by an error, the others end theirs, and the other way round. Left well, all have."""
        ...

    def look(self) -> bool:
        """Called again and again meanwhile. Whether all processes of another node have ended well.

        Raises:
            PipeOptimError: as another node tells: one of its stages has failed, or it is gone.
        """
        ...


class NoOthers:
    """There is one machine."""

    node: Node | None = None
    addresses = (ADDRESS,)

    def gather(self) -> None:
        """Nobody to wait for."""

    def begin(self, attempt: Attempt) -> None:
        """Nobody to tell."""

    def attempt(self) -> AbstractContextManager[None]:
        """Nobody to tell."""
        return nullcontext()

    def look(self) -> bool:
        """Nobody to hear."""
        return False


ALONE = NoOthers()


class _Together:
    """What node 0 and the others have in common.

    Args:
        node: this one.
        run: name of its directory, which all must have alike.
        config: of the run, too.
        stop: signals, which are passed on to all.
        say: is told what this node waits for.
        liveness: seconds without a sign of life after which a node is gone; None: only when its connection ends.
    """

    def __init__(
        self,
        node: Node,
        run: str,
        config: TrainConfig,
        stop: StopSignals,
        say: Callable[[str], None],
        liveness: float | None = 10.0,
    ) -> None:
        self.node, self.run, self.config, self.stop, self.say, self.liveness = node, run, config, stop, say, liveness
        self._told_signal = False

    def _signal_to_tell(self) -> int:
        """The signal that came here, once; 0 for none."""
        if self._told_signal or not self.stop.number:
            return 0
        self._told_signal = True
        return self.stop.number

    def _hear_signal(self, number: object) -> None:
        """As if it had come here; anything but a number means nothing."""
        if isinstance(number, int):
            self._told_signal = True
            self.stop.hear(number)

    def _check_alive(self, link: NodeLink, name: str) -> None:
        if link.ended:
            raise StageFailure(f"{name} is gone: its command has ended, or cannot be reached")
        if self._is_silent(link):
            link.close()
            raise StageFailure(f"{name} has given no sign of life for {self.liveness:g} s")

    def _is_silent(self, link: NodeLink) -> bool:
        return self.liveness is not None and time.monotonic() - link.heard > self.liveness

    def _wait(self, until: Callable[[], T | None], seconds: float, whom: Callable[[], str]) -> T:
        """Until that is so, or there; what it is.

        Raises:
            StageFailure: it was not in so many seconds.
            AbortedError: a signal came.
        """
        end, say_at = time.monotonic() + seconds, time.monotonic() + 2.0
        while not (found := until()):
            now = time.monotonic()
            if self.stop.wanted:
                raise AbortedError(f"{self.stop.name} came while waiting for {whom()}", self.stop.number)
            if now > end:
                raise StageFailure(
                    f"{whom()} did not come within {seconds:g} s; give the same command there, with its --node-rank"
                )
            if now > say_at:
                self.say(f"waiting for {whom()}")
                say_at = end + 1.0
            time.sleep(_PAUSE)
        return found


class FirstNode(_Together):
    """Node 0, which the others call. While entered, it listens."""

    def __enter__(self) -> FirstNode:
        self.address = self.node.master()
        family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
        try:
            self._listener = socket.create_server((self.address, self.node.master_port), family=family, backlog=_CALLERS)
        except OSError as error:
            raise ConfigError(
                f"node 0 cannot listen at {self.node.where} ({error.strerror}); master_addr must be an address of node 0 itself, and the "
                "port be free"
            ) from error
        self._listener.setblocking(False)
        self._callers: list[NodeLink] = []  # who have not said yet who they are
        self._links: dict[int, NodeLink] = {}
        self._hosts: dict[int, tuple[str, str]] = {}  # address and name of a node's machine
        self._running: set[int] = set()  # nodes whose processes have begun and not ended
        self._some_done = False  # well, in this attempt
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for link in self._links.values():
            link.send(over=None if error is None else told(error))
            link.close()
        for caller in self._callers:
            caller.close()
        self._listener.close()

    @property
    def addresses(self) -> tuple[str, ...]:
        """Of all nodes."""
        return (self.address, *(self._hosts[rank][0] for rank in range(1, self.node.count)))

    def gather(self) -> None:
        """Wait until all nodes are there."""
        self._wait(self._all_here, JOIN, self._missing)

    def begin(self, attempt: Attempt) -> None:
        """Tell them to start."""
        self._running, self._some_done = set(self._links), False
        for link in self._links.values():
            link.heard = time.monotonic()
            link.send(begin=asdict(attempt))

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """As in :class:`OtherNodes`; :meth:`begin` comes first in it."""
        self._running.clear()  # of the attempt before: a node that was gone there
        try:
            yield
            self._tell_all(0, ended=1)
            while self._running:  # the store is here, and they may still read in it
                self.look()
                time.sleep(_PAUSE)
        except BaseException as error:
            self._end_others(error)
            raise

    def look(self) -> bool:
        """As in :class:`OtherNodes`."""
        self._meet_callers()
        if number := self._signal_to_tell():
            self._tell_all(0, signal=number)
        for rank, link in list(self._links.items()):
            link.beat()
            for what in link.receive():
                self._hear(rank, what)
            if rank in self._running or link.ended:
                self._check_alive(link, self._name(rank))
        return self._some_done

    def _hear(self, rank: int, what: dict[str, Any]) -> None:
        self._pass_signal(rank, what)
        if "done" in what:
            self._running.discard(rank)
            self._some_done = True
            self._tell_all(rank, ended=1)
        if "failed" in what:
            self._running.discard(rank)
            error = as_error(what["failed"])
            error.args = (f"{self._name(rank)}: {error.args[0]}",)
            raise error

    def _pass_signal(self, rank: int, what: dict[str, Any]) -> None:
        """If that is what a node says: it is for all."""
        if "signal" in what:
            self._hear_signal(what["signal"])
            self._tell_all(rank, signal=what["signal"])

    def _tell_all(self, source: int, **what: Any) -> None:
        """But for the node that said it."""
        for rank, link in self._links.items():
            if rank != source:
                link.send(**what)

    def _end_others(self, error: BaseException) -> None:
        """And wait until they have, so that nothing of this attempt is written when the next one begins."""
        self._tell_all(0, stop=str(error.args[0]) if error.args else type(error).__name__)
        end = time.monotonic() + _END
        while any(not self._links[rank].ended for rank in self._running) and time.monotonic() < end:
            for rank, link in self._links.items():
                with suppress(PipeOptimError):
                    for what in link.receive():
                        self._hear(rank, what)
            time.sleep(_PAUSE)

    # -- callers -------------------------------------------------------------------------------------------------------

    def _all_here(self) -> bool:
        self._meet_callers()
        for rank, link in list(self._links.items()):
            for what in link.receive():
                self._pass_signal(rank, what)
            if link.ended or self._is_silent(link):
                link.close()
                del self._links[rank]
        return len(self._links) == self.node.count - 1

    def _missing(self) -> str:
        names = [f"node {rank}" for rank in range(1, self.node.count) if rank not in self._links]
        return f"{' and '.join(names)} to call at {self.node.where}"

    def _meet_callers(self) -> None:
        with suppress(BlockingIOError):
            while len(self._callers) < _CALLERS:
                self._callers.append(NodeLink(self._listener.accept()[0]))
        for caller in self._callers[:]:
            said = caller.receive()
            if said:
                self._answer(caller, said[0])
            elif time.monotonic() - caller.heard > _HELLO:
                caller.close()
            if said or caller.ended:
                self._callers.remove(caller)

    def _answer(self, caller: NodeLink, said: dict[str, Any]) -> None:
        refusal = self._refusal(said)
        if refusal:
            caller.send(refused=refusal)
            caller.close()
            return
        rank = int(said["rank"])
        self._links[rank] = caller
        self._hosts[rank] = caller.peer, str(said.get("host"))[:100]
        caller.send(welcome=socket.gethostname())

    def _refusal(self, said: dict[str, Any]) -> str:
        own = hello(self.node, self.run, self.config)
        if not isinstance(said.get("rank"), int) or not isinstance(said.get("config"), str):
            return "node 0 expects the command of another node"
        for name in ("nnodes", "pipeoptim", "torch"):
            if said.get(name) != own[name]:
                return f"{name} is {said.get(name)}, and {own[name]} on node 0; it must be the same on all nodes"
        if not 1 <= said["rank"] < self.node.count:
            return f"node_rank is {said['rank']}, must be from 1 to {self.node.count - 1}"
        link = self._links.get(said["rank"])
        if link is not None and not link.ended:
            return f"node_rank is {said['rank']}, but the machine {self._hosts[said['rank']][1]} is that node already"
        if difference := _difference(said["config"], own["config"]):
            return difference
        if said.get("run") != self.run:  # --new, given again where the run has begun, means another one
            return f"the run is called {said.get('run')}, and {self.run} on node 0; give --name {self.run} here, and no --new"
        return ""

    def _name(self, rank: int) -> str:
        address, host = self._hosts[rank]
        return f"node {rank} ({host}, {address})"


class AnotherNode(_Together):
    """A node that calls node 0. While entered, it is connected.

    Raises:
        ConfigError: node 0 has refused it; the message says why.
        StageFailure: node 0 did not answer in time.
    """

    def __enter__(self) -> AnotherNode:
        self._name = f"node 0 ({self.node.where})"
        self._heard: list[dict[str, Any]] = []
        self._link = self._wait(self._call, JOIN, lambda: self._name)
        try:
            self._introduce()
        except BaseException:
            self._link.close()
            raise
        return self

    def _introduce(self) -> None:
        self._link.send(**hello(self.node, self.run, self.config))
        self._wait(lambda: self._receive() or self._link.ended, JOIN, lambda: self._name)
        answer = self._heard.pop(0) if self._heard else {}
        if "refused" in answer:
            raise ConfigError(str(answer["refused"]))
        if "welcome" not in answer:
            raise ConfigError(f"nobody of pipeoptim answers at {self.node.where}; give the address and port of node 0")

    def __exit__(self, *raised: object) -> None:
        self._link.close()

    def next_attempt(self) -> Attempt | None:
        """What to start next; None when the run is over.

        Raises:
            PipeOptimError: as the run has ended.
        """
        while not self._link.ended or self._heard:
            self._receive()
            while self._heard:
                what = self._heard.pop(0)
                if "signal" in what:
                    self._hear_signal(what["signal"])
                if "over" in what:
                    if what["over"] is not None:
                        raise as_error(what["over"])
                    return None
                if "begin" in what:
                    begin = what["begin"]
                    return Attempt(**{**begin, "addresses": tuple(begin["addresses"])})
            self._tell_signal()
            self._link.beat()
            time.sleep(_PAUSE)
        raise StageFailure(f"{self._name} is gone: its command has ended, or cannot be reached")

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """As in :class:`OtherNodes`."""
        self._link.heard = time.monotonic()
        try:
            yield
        except BaseException as error:
            self._link.send(failed=told(error))
            raise
        self._link.send(done=1)

    def look(self) -> bool:
        """As in :class:`OtherNodes`."""
        self._tell_signal()
        self._link.beat()
        self._receive()
        for what in self._heard[:]:
            if "signal" in what:
                self._heard.remove(what)
                self._hear_signal(what["signal"])
            if "stop" in what:
                self._heard.remove(what)
                raise StageFailure(str(what["stop"]))
            if "over" in what:  # it stays, and tells why
                raise StageFailure("node 0 has ended the run")
        self._check_alive(self._link, self._name)
        return any("ended" in what for what in self._heard)

    def _tell_signal(self) -> None:
        if number := self._signal_to_tell():
            self._link.send(signal=number)

    def _receive(self) -> bool:
        self._heard += [what for what in self._link.receive() if "beat" not in what]
        return bool(self._heard)

    def _call(self) -> NodeLink | None:
        with suppress(OSError):
            return NodeLink(socket.create_connection((self.node.master(), self.node.master_port), timeout=2.0))
        return None


def hello(node: Node, run: str, config: TrainConfig) -> dict[str, Any]:
    """What a node says of itself."""
    import torch

    return {
        "rank": node.rank,
        "nnodes": node.count,
        "host": socket.gethostname(),
        "pipeoptim": pipeoptim.__version__,
        "torch": torch.__version__,
        "run": run,
        "config": config.to_json(),
    }


def _difference(theirs: str, own: str) -> str:
    """The first setting in which two configurations differ; empty where there is none."""
    if theirs == own:
        return ""
    try:
        other = dict(json.loads(theirs))
    except (ValueError, RecursionError):
        return "the settings of this node cannot be read"
    for name, value in json.loads(own).items():
        if other.get(name) != value:
            return f"{name} is {other.get(name)!r}, and {value!r} on node 0; give the same command on all nodes, but for --node-rank"
    return "the settings of this node are others than those of node 0"
