"""Where to cut a model: what its blocks cost on the real device, and the best contiguous cut for those costs."""

from pipeoptim.partitioning.api import Partition, partition
from pipeoptim.partitioning.balance import best_cut, best_replicas
from pipeoptim.partitioning.profile import BlockCost, profile

__all__ = ["BlockCost", "Partition", "best_cut", "best_replicas", "partition", "profile"]
