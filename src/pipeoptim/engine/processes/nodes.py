"""On which machine (*node*) the process of a stage is, where a run that survives has supervisors on several."""

from __future__ import annotations

import os
from dataclasses import dataclass

ADDRESSES = "PIPEOPTIM_NODES"
"""Environment variable of a supervised process with the IP addresses of all nodes, in their order, with commas between them."""


@dataclass(frozen=True)
class Nodes:
    """The nodes of a pipeline: each holds equally many stages, one after the other.

    Args:
        addresses: of the nodes; none where there is one node only.
        depth: stages in all.

    Example:
        >>> nodes = Nodes(("10.0.0.1", "10.0.0.2"), depth=4)
        >>> nodes.node(1), nodes.node(2), nodes.host(2, towards=1), nodes.host(3, towards=2)
        (0, 1, '10.0.0.2', '')
    """

    addresses: tuple[str, ...]
    depth: int

    @classmethod
    def of_this_run(cls, depth: int) -> Nodes:
        """As the supervisor has written them."""
        return cls(tuple(filter(None, os.environ.get(ADDRESSES, "").split(","))), depth)

    @property
    def several(self) -> bool:
        """Whether there is more than one."""
        return len(self.addresses) > 1

    def node(self, k: int) -> int:
        """That of stage ``k``."""
        return k * len(self.addresses) // self.depth

    def host(self, k: int, towards: int) -> str:
        """The address of stage ``k`` for stage ``towards``; empty where both are on one node."""
        return self.addresses[self.node(k)] if self.node(k) != self.node(towards) else ""
