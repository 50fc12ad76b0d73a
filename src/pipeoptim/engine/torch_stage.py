"""The only place that uses ``torch.distributed.pipelining``: what is read of a user's ``PipelineStage``.

Only attributes that have been stable since torch 2.5 are read: the stage's module, index, device and group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage

from pipeoptim.engine.stage.origin import find_origins
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

    @property
    def cut(self) -> tuple[int, ...]:
        """How many blocks each stage of this pipeline has, where ``partition`` made it."""
        # A module cut for another number of stages may be part of a new pipeline: then nothing is compared.
        lengths = next((origin.lengths for _, _, origin in find_origins(self.module)), ())
        return lengths if len(lengths) == self.depth else ()


def read_stage(stage: PipelineStage, per_process: int = 1) -> StagePlace:
    """What the engine needs of ``stage``, of which every process holds ``per_process``, stage k process ``k mod P``.

    Raises:
        ConfigError: not a ``PipelineStage``, or stages and processes do not match.
    """
    if not isinstance(stage, PipelineStage):
        raise ConfigError(
            f"stage is a {type(stage).__name__}, must be a torch.distributed.pipelining.PipelineStage; "
            "wrap the module: PipelineStage(module, stage_index, num_stages, device)"
        )
    group = stage.group if stage.group is not None else dist.group.WORLD
    members = dist.get_process_group_ranks(group)
    if len(members) * per_process != stage.num_stages:
        raise ConfigError(
            f"the pipeline has {stage.num_stages} stages, its group {len(members)} processes and this process {per_process} of the "
            "stages; there must be equally many on each: give PipelineStage the group of one pipeline, start as many processes as "
            "stages, or give all stages of a process to InterleavedSchedule"
        )
    ranks = tuple(members) * per_process
    if ranks[stage.stage_index] != dist.get_rank():
        raise ConfigError(
            f"stage {stage.stage_index} belongs on process {stage.stage_index % len(members)} of its group's {len(members)}, not on "
            f"process {members.index(dist.get_rank())}; stage k lives on process k mod {len(members)}"
        )
    return StagePlace(stage.submod, stage.stage_index, stage.num_stages, torch.device(stage.device), ranks)
