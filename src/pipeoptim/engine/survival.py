"""What a pipeline does so that one of its processes can be replaced while the others wait (``survive``).

Every so many mini-batches a process leaves an image of itself (:mod:`~pipeoptim.engine.processes.standby`). Where the process dies, its
image goes on from that moment: it connects again to its neighbours, gets from them what they have sent since then, and does again what
the dead process had done, with the same bits, sending nothing that the neighbours have already
(:mod:`~pipeoptim.engine.transport.kept_link`).

Three things of the outside world do not repeat themselves, and are taken care of here: connections, which an image must not share;
files, which are cut back; and a request to stop, which comes from a person at some moment and is written down with its mini-batch.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Collection, Sequence
from functools import partial

import torch

from pipeoptim.engine.processes.connect import Connections
from pipeoptim.engine.processes.image_memory import prepare_for_images
from pipeoptim.engine.processes.kept_connections import BoundaryListener, call
from pipeoptim.engine.processes.nodes import Nodes
from pipeoptim.engine.processes.norm_exchange import NormTransport, ProcessNorms
from pipeoptim.engine.processes.open_files import cut_back, lengths_of_open_files
from pipeoptim.engine.processes.rendezvous import Rendezvous
from pipeoptim.engine.processes.shared_memory import kept_turns, shared_memory_norms
from pipeoptim.engine.processes.standby import Standby
from pipeoptim.engine.processes.store_connections import renew_store_connections
from pipeoptim.engine.processes.stored_norms import StoredNorms
from pipeoptim.engine.stage.tied import Tied
from pipeoptim.engine.torch_stage import StagePlace
from pipeoptim.engine.transport.kept_link import KeptLink, LinkSet
from pipeoptim.engine.transport.ports import Ports
from pipeoptim.errors import ConfigError, StageFailure
from pipeoptim.options import PipelineOptions
from pipeoptim.schedule import AUTO

_STOP = "stop"  # the key of the mini-batch at which stage 0 asks all to stop


class Survival:
    """Of the process of stage ``k`` of ``depth``.

    Args:
        every: mini-batches between two images.
    """

    def __init__(self, every: int, k: int, depth: int) -> None:
        standby = Standby.of_this_process()
        if standby is None:
            raise ConfigError(
                f"survive is {every}, but nobody would replace this process when it dies: torchrun ends the others as well; start it by "
                "pipeoptim train --survive (in Python, by pipeoptim.train.run() with survive in its configuration), or leave survive out"
            )
        self.every, self.k, self.depth = every, k, depth
        self._standby = standby
        self._links = LinkSet()
        self._listener: BoundaryListener | None = None
        self._stop_at: int | None = None
        self._catches_up = False
        self._images = 0

    def connect(self, rendezvous: Rendezvous, norms: ProcessNorms | None) -> Connections:
        """The links of this stage, in place of those that end with a neighbour. All processes call this.

        Raises:
            StageFailure: another process did not come within the time-out.
        """
        self._rendezvous = rendezvous
        rendezvous.while_waiting = self._links.look_after
        connections, timeout = Connections(rendezvous, norms), rendezvous.timeout.total_seconds()
        previous: KeptLink | None = None
        following: KeptLink | None = None
        k, nodes = self.k, Nodes.of_this_run(self.depth)
        if k > 0:
            host = nodes.host(k, towards=k - 1)
            self._listener = BoundaryListener(rendezvous.store, k - 1, self._standby.generation, host, timeout)
            previous = self._links.add(k - 1, self._listener.accept, timeout, apart=host != "")
        if k < self.depth - 1:
            apart = nodes.node(k) != nodes.node(k + 1)
            following = self._links.add(k + 1, partial(self._call, rendezvous), timeout, apart)
        connections.ports[k] = Ports(previous, previous, following, following)
        if norms is not None:
            norms.connect(self._norm_transport(rendezvous, norms.in_flight + self.every, nodes.several))
        return connections

    def _norm_transport(self, rendezvous: Rendezvous, behind: int, several_nodes: bool) -> NormTransport:
        """Where a stage is at most ``behind`` updates behind another."""
        if several_nodes:
            seconds, kept = rendezvous.timeout.total_seconds(), kept_turns(max(self.depth, behind))
            return StoredNorms(rendezvous.store, self.k, self.depth, seconds, kept, self._links.look_after)
        page = shared_memory_norms(rendezvous, True, _nobody_watches, behind)
        if page is None:
            raise StageFailure("the processes cannot share memory for the norms of their gradients, which survive needs")
        page.keep_waiting_for_replaced(self._links.look_after)
        return page

    def begin_mini_batch(self, number: int) -> None:
        """Leave an image where one is due. Called between two mini-batches; a process that takes over returns from here."""
        if self._standby.stands(wait=number % self.every == 0):
            for link in self._links:
                link.note_standing()
        if number % self.every == 0 or self._standby.lost:
            self._leave_image(number)
        if self._catches_up and not self._replays:
            self._catches_up = False
            self._standby.tell_caught_up(number)

    @property
    def _replays(self) -> bool:
        return any(link.replays for link in self._links)

    def stops(self, number: int, wanted: bool) -> bool:
        """On stage 0, whether mini-batch ``number`` tells all stages to stop.

        A process that takes over tells it with the mini-batch with which it was told before, and with no other that is done again.
        """
        if self._stop_at is None and wanted and not self._replays:
            self._rendezvous.store.set(_STOP, str(number))  # before anybody is told
            self._stop_at = number
        return self._stop_at is not None and number >= self._stop_at

    def close(self) -> None:
        """Let go of all connections."""
        for link in self._links:
            link.close()
        if self._listener is not None:
            self._listener.close()

    def _leave_image(self, number: int) -> None:
        if self._images == 1:  # not before there are optimizer states and predictions
            prepare_for_images()
        self._images += 1
        lengths = lengths_of_open_files()
        for link in self._links:
            link.note_image()
        if not self._standby.keep(number, in_image=self._let_go):
            return
        self._catches_up = True
        for link in self._links:
            link.note_takeover()
        renew_store_connections(*self._rendezvous.store_address)
        cut_back(lengths)
        if self._listener is not None:
            self._listener.listen(self._rendezvous.store, self._standby.generation)
        if self.k == 0 and self._rendezvous.store.check([_STOP]):
            self._stop_at = int(self._rendezvous.store.get(_STOP))

    def _let_go(self) -> None:
        """In an image: while it sleeps, neighbours must see that the process has died, and nobody may call the image."""
        for link in self._links:
            link.drop()
        if self._listener is not None:
            self._listener.close()

    def _call(self, rendezvous: Rendezvous, seconds: float) -> socket.socket:
        return call(rendezvous.store, self.k, self._standby.generation, seconds, rendezvous.timeout.total_seconds())


def check_survives(options: PipelineOptions, places: Sequence[StagePlace], tied: Collection[Tied]) -> None:
    """Raises ConfigError for what a process that takes over could not go on with."""
    reason = ""
    if sys.platform != "linux":
        reason = (
            f"{sys.platform} has no processes that take over orphans and no memory that is passed on by descriptor; Linux has"
        )
    elif any(place.device.type != "cpu" for place in places):
        reason = "the state of a GPU is not in an image of its process; restart from a checkpoint instead (--resume)"
    elif torch.get_num_threads() > 1:
        reason = (
            f"this process has {torch.get_num_threads()} CPU threads, of which its image would have one; give it one (--threads 1, "
            "torch.set_num_threads(1))"
        )
    elif len(places) > 1:
        reason = "interleaved stages are not covered; give each process one stage (chunks 1)"
    elif options.replicas is not None:
        reason = "replicas, which exchange gradients in process groups, are not covered; leave one of them out"
    elif tied:
        reason = f"weights that several stages share ({next(iter(tied))}) are not covered; leave survive out, or tie none"
    elif options.slack == AUTO:
        reason = "slack 'auto' measures links that survive replaces; give a number"
    elif options.trace is not None:
        reason = "a trace would hold what was done twice; leave one of them out"
    elif options.transport != "auto":
        reason = f"transport is {options.transport!r}, and a process that is replaced cannot join its group again; leave transport out"
    if reason:
        raise ConfigError(f"survive is {options.survive}, but {reason}")


def _nobody_watches(peer: int | None) -> None:
    """Who has died is the supervisor's to see."""
