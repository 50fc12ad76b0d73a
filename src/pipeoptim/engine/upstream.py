"""The only place that touches ``torch.distributed.pipelining``: what is read of a user's ``PipelineStage``.

Only attributes that have been stable since torch 2.5 are used: the stage's module, its place, its device and its group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage

from pipeoptim.errors import ConfigError


@dataclass(frozen=True)
class StagePlace:
    """One stage of a pipeline as torch describes it.

    Attributes:
        module: the stage's part of the model.
        k, depth: which stage of how many.
        device: where it computes.
        ranks: the global rank of the process of each stage.
    """

    module: nn.Module
    k: int
    depth: int
    device: torch.device
    ranks: tuple[int, ...]


def read_stage(stage: PipelineStage) -> StagePlace:
    """What the engine needs of ``stage``.

    Raises:
        ConfigError: not a ``PipelineStage``, or several stages share one process.
    """
    if not isinstance(stage, PipelineStage):
        raise ConfigError(
            f"stage is a {type(stage).__name__}, must be a torch.distributed.pipelining.PipelineStage; "
            "wrap the module: PipelineStage(module, stage_index, num_stages, device)"
        )
    group = stage.group if stage.group is not None else dist.group.WORLD
    members = dist.get_process_group_ranks(group)
    if len(members) != stage.num_stages:
        raise ConfigError(
            f"the pipeline has {stage.num_stages} stages and its group {len(members)} processes; there must be one process "
            "per stage: give PipelineStage the group of one pipeline, or start as many processes as stages"
        )
    return StagePlace(stage.submod, stage.stage_index, stage.num_stages, torch.device(stage.device), tuple(members))
