"""Devices in nodes, nodes in sites, and the links of each level: which link lies between two devices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf

from pipeoptim.errors import ConfigError
from pipeoptim.simulate.figures import LEAST, MOST, is_divisor, is_figure
from pipeoptim.simulate.profile import LinkProfile

MOST_DEVICES = 10_000


@dataclass(frozen=True)
class ClusterLevel:
    """One level of a cluster.

    Attributes:
        size: devices of a node, nodes of a site, or sites.
        latency, bandwidth: of the links between its members, in seconds and bytes per second and direction.
    """

    size: int
    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Cluster:
    """Devices, numbered node after node and site after site.

    Attributes:
        levels: from the inside to the outside.
        speeds: of each device, relative to the one that was profiled.
        memory: bytes of each device.
    """

    levels: tuple[ClusterLevel, ...]
    speeds: tuple[float, ...]
    memory: float = inf

    def __post_init__(self) -> None:
        for level in self.levels:
            if level.size < 1 or not is_figure(level.latency) or not is_divisor(level.bandwidth):
                raise ConfigError(
                    f"a level of the cluster has {level.size} members, links of {level.latency:g} s and {level.bandwidth:g} bytes/s, "
                    f"must have at least 1, of at least 0 and above 0 (up to {MOST:g} s, from {LEAST:g} bytes/s)"
                )
        room = 1
        for level in self.levels:
            room *= level.size
        if room < len(self.speeds):
            raise ConfigError(f"the cluster has room for {room} devices, not for {len(self.speeds)}; give larger levels")
        if not self.speeds or not all(is_figure(speed) and is_divisor(speed) for speed in self.speeds):
            raise ConfigError(
                f"speeds are {list(self.speeds)}, must be numbers above 0 ({LEAST:g} to {MOST:g}), one for each device"
            )
        if not self.memory > 0:
            raise ConfigError(f"memory is {self.memory:g} bytes, must be above 0")

    def link(self, one: int, other: int) -> LinkProfile:
        """Between two devices: that of the innermost level that has both."""
        size = 1
        for level in self.levels:
            size *= level.size
            if one // size == other // size:
                return LinkProfile(level.latency, level.bandwidth)
        raise AssertionError("the outermost level has all devices")

    def slowest(self, pairs: Iterable[tuple[int, int]]) -> LinkProfile:
        """The longest latency and the least bandwidth of the links between those pairs."""
        links = [self.link(*pair) for pair in pairs]
        return LinkProfile(max(link.latency for link in links), min(link.bandwidth or inf for link in links))


def read_cluster(devices: int, sizes: str, links: str, speeds: Sequence[float] = (), memory: float = inf) -> Cluster:
    """A cluster as it is written on the command line.

    Args:
        devices: how many there are.
        sizes: devices of a node, nodes of a site, ...: "8,4"; the outermost level takes the rest. "" for one level.
        links: of each level, GB/s and, behind a colon, milliseconds: "100:0.01,25:0.05,1:20".
        speeds: of the devices, relative to the profile; the last one holds for all that follow.
        memory: bytes of each device.

    Raises:
        ConfigError: it cannot be read, or the numbers of levels differ.

    Example:
        >>> cluster = read_cluster(16, "8", "100:0.01,10:0.05")
        >>> cluster.link(0, 7).bandwidth, cluster.link(0, 8).latency
        (100000000000.0, 5e-05)
    """
    if devices < 1:
        raise ConfigError(f"devices is {devices}, must be at least 1")
    if devices > MOST_DEVICES:
        raise ConfigError(f"devices is {devices}, must be at most {MOST_DEVICES:,}")
    try:
        inner = [int(part) for part in sizes.split(",")] if sizes else []
        each = [part.partition(":") for part in links.split(",")]
        pairs = [(float(bandwidth) * 1e9, float(latency or 0) / 1e3) for bandwidth, _, latency in each]
    except ValueError:
        raise ConfigError(
            f"nodes {sizes!r} with links {links!r} cannot be read; write sizes of the inner levels as 8,4 and links of all levels as GB/s "
            "and milliseconds: 100:0.01,25:0.05,1:20"
        ) from None
    if len(pairs) != len(inner) + 1:
        raise ConfigError(
            f"links {links!r} are {len(pairs)}, must be one for each level of the cluster: {len(inner)} inner ones ({sizes or 'none'}) and "
            "the outermost"
        )
    within = 1
    for size in inner:
        if size < 1:
            raise ConfigError(f"nodes is {sizes!r}, must be numbers of at least 1")
        within *= size
    levels = [ClusterLevel(size, *reversed(pair)) for size, pair in zip([*inner, -(-devices // within)], pairs, strict=True)]
    given = list(speeds[:devices]) or [1.0]
    return Cluster(tuple(levels), tuple(given + [given[-1]] * (devices - len(given))), memory)
