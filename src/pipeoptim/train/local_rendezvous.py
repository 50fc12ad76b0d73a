"""How torch's elastic agent and the workers of a run on one machine find each other: by a store on the loopback interface.

The agent's own ``c10d`` and ``static`` rendezvous serve the store on all interfaces of the machine.
"""

from __future__ import annotations

from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

from pipeoptim.engine.processes.loopback import ADDRESS, loopback_store

NAME = "pipeoptim-loopback"


class LoopbackRendezvous(RendezvousHandler):
    """One agent, which serves the store to its workers as long as it lives.

    Args:
        run_id: of the run.
    """

    def __init__(self, run_id: str) -> None:
        self._run_id, self._store = run_id, loopback_store()

    def get_backend(self) -> str:
        """The name under which it is registered."""
        return NAME

    @property
    def use_agent_store(self) -> bool:
        """Workers are clients of the agent's store."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Nobody to wait for."""
        where = RendezvousStoreInfo(ADDRESS, self._store.port)
        return RendezvousInfo(PrefixStore(self._run_id, self._store), 0, 1, where)

    def is_closed(self) -> bool:
        """Never."""
        return False

    def set_closed(self) -> None:
        """Nobody else would come."""

    def num_nodes_waiting(self) -> int:
        """None."""
        return 0

    def get_run_id(self) -> str:
        """As it was given."""
        return self._run_id

    def shutdown(self) -> bool:
        """The store ends with the agent."""
        return True


def _create(parameters: RendezvousParameters) -> RendezvousHandler:
    return LoopbackRendezvous(parameters.run_id)


def register() -> str:
    """Make it known to the agent; the name to give as ``rdzv_backend``. May be called again."""
    rendezvous_handler_registry.register(NAME, _create)
    return NAME
