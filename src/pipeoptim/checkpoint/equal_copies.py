"""Copies of one weight on several stages: where they differ, an export of one of them would be another model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeoptim.checkpoint.saving_group import SavingGroup
from pipeoptim.errors import ConfigError

if TYPE_CHECKING:
    from pipeoptim.engine.pipeline import Pipeline


def refuse_unequal_copies(
    pipe: Pipeline,
    names_of: Mapping[int, Mapping[str, Sequence[str]]],
    processes: SavingGroup,
    copied: Callable[[Tensor], Tensor],
) -> None:
    """Raises ConfigError, in all processes, where stages hold a parameter under one original name with different values.

    Args:
        names_of: stage -> name in the stage -> its original names.
        copied: a tensor of this process, whole and on the CPU.
    """
    held: dict[int, dict[str, Tensor]] = {}
    for k in pipe.local_stages:
        own = dict(pipe.stage_module(k).named_parameters(remove_duplicate=False))
        # Parameters only: a buffer that stages run again for themselves is right where its own stage has it.
        held[k] = {originals[0]: own[name] for name, originals in names_of[k].items() if name in own}
    everywhere = {k: names for part in processes.gather({k: list(own) for k, own in held.items()}) for k, names in part.items()}
    holders: dict[str, list[int]] = {}
    for k in sorted(everywhere):
        for name in everywhere[k]:
            holders.setdefault(name, []).append(k)
    shared = {name: stages for name, stages in holders.items() if len(stages) > 1}
    found = {k: {name: _digest(copied(own[name])) for name in own if name in shared} for k, own in held.items()}
    digests = {k: own for part in processes.gather(found) for k, own in part.items()}
    for name, (first, *others) in shared.items():
        other = next((k for k in others if digests[k][name] != digests[first][name]), None)
        if other is not None:
            raise ConfigError(
                f"{name!r} has other values on stage {first} than on stage {other}, but it is one weight in the model: they were trained "
                "apart, or one was written to; keep copies equal with tied=, or give them names of their own with names="
            )


def _digest(tensor: Tensor) -> str:
    octets = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(octets).hexdigest()  # type: ignore[arg-type]  # a buffer, which the type of arrays says in Python 3.12
