"""Cutting a model into stages: measured costs of its blocks, and the best contiguous cut for these costs."""

from pipeoptim.engine.stage.tied import Tied
from pipeoptim.partitioning.api import partition
from pipeoptim.partitioning.balance import best_cut, best_replicas
from pipeoptim.partitioning.block_costs import BlockCost, profile
from pipeoptim.partitioning.parameter_places import full_state_dict, untie
from pipeoptim.partitioning.result import Partition

__all__ = ["BlockCost", "Partition", "Tied", "best_cut", "best_replicas", "full_state_dict", "partition", "profile", "untie"]
