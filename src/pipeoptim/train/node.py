"""One of the machines (*nodes*) that carry out a run together, each by a command of its own with a supervisor (``survive``)."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass

from pipeoptim.errors import ConfigError, counted


@dataclass(frozen=True)
class Node:
    """This machine's place among them. Names and meaning are those of torchrun's options.

    Args:
        rank: 0 for the first, which holds stage 0 and serves the others.
        count: how many there are; each holds equally many stages.
        master_addr: IP address or name of node 0, as all of them reach it.
        master_port: where it listens.

    Raises:
        ConfigError: one of them is impossible.

    Example:
        >>> node = Node(1, 2, "10.0.0.1", 29500)
        >>> list(node.ranks(4)), node.name
        ([2, 3], 'node 1')
    """

    rank: int
    count: int
    master_addr: str
    master_port: int

    def __post_init__(self) -> None:
        if self.count < 2:
            raise ConfigError(f"nnodes is {self.count}, must be at least 2; leave it out where there is one machine")
        if not 0 <= self.rank < self.count:
            raise ConfigError(
                f"node_rank is {self.rank}, must be from 0 to {self.count - 1} where nnodes is {self.count}, another one on each machine"
            )
        if not self.master_addr or self.master_addr != self.master_addr.strip():
            raise ConfigError(
                f"master_addr is {self.master_addr!r}, must be the IP address or the name of node 0, such as 10.0.0.1, the same on all "
                "machines"
            )
        if not 1 <= self.master_port <= 65535:
            raise ConfigError(f"master_port is {self.master_port}, must be from 1 to 65535, and free on node 0")

    @property
    def name(self) -> str:
        """In messages."""
        return f"node {self.rank}"

    @property
    def where(self) -> str:
        """Of node 0."""
        host = f"[{self.master_addr}]" if ":" in self.master_addr else self.master_addr
        return f"{host}:{self.master_port}"

    def master(self) -> str:
        """The IP address of node 0.

        Raises:
            ConfigError: the name has none, or one that other machines do not reach.
        """
        try:
            address = str(socket.getaddrinfo(self.master_addr, self.master_port, type=socket.SOCK_STREAM)[0][4][0])
        except OSError as error:
            raise ConfigError(
                f"master_addr is {self.master_addr!r}, which has no IP address ({error}); give the address of node 0 itself"
            ) from error
        found = ipaddress.ip_address(address)
        named = address != self.master_addr and self.master_addr != "localhost"
        if found.is_unspecified or found.is_multicast or (named and found.is_loopback):
            raise ConfigError(
                f"master_addr is {self.master_addr}, on this machine {address}, which other machines do not reach; give the IP address of "
                "node 0 in their network"
            )
        return address

    def ranks(self, processes: int) -> range:
        """Of the ``processes`` in all, those on this node."""
        each = processes // self.count
        return range(self.rank * each, (self.rank + 1) * each)

    def check(self, processes: int) -> None:
        """Raises ConfigError where so many processes cannot be divided evenly."""
        if processes % self.count:
            raise ConfigError(
                f"nnodes is {self.count}, which does not divide the {counted(processes, 'stage')}; every machine has equally many stages"
            )
