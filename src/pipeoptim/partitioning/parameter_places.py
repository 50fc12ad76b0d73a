"""The places of a model's parameters in its stages: their names there, and the weights that several stages share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from pipeoptim.checkpoint.parameter_names import inverted, merge
from pipeoptim.engine.stage.origin import note_ties
from pipeoptim.engine.stage.tied import Tied
from pipeoptim.errors import ConfigError
from pipeoptim.partitioning.weight_slots import shadow_copy, weight_slots


def full_state_dict(names: Sequence[Mapping[str, str]], states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The ``state_dict`` of the whole model from those of its stages.

    Args:
        names: per stage, original name -> name in the stage, as in ``Partition.names``.
        states: per stage, its ``state_dict()``.

    A name that several stages have is taken from the first.

    Raises:
        ConfigError: a state lacks a name.
    """
    return merge(dict(enumerate(map(inverted, names))), dict(enumerate(states)))


def find_parameter_places(model: nn.Module, stages: Sequence[nn.Module]) -> tuple[list[dict[str, str]], list[Tied]]:
    """Names and tied parameters of stages that hold the very tensors of ``model``, before any is copied."""
    # Parameters are matched by identity, so this must come before any of them is copied.
    originals: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            originals.setdefault(id(tensor), []).append(name)
    names: list[dict[str, str]] = []
    places: dict[int, list[tuple[int, str]]] = {}
    parameters = {id(p) for p in model.parameters()}
    for k, stage in enumerate(stages):
        entries: dict[int, list[str]] = {}
        for own, tensor in stage.state_dict(keep_vars=True).items():
            entries.setdefault(id(tensor), []).append(own)
        mapping: dict[str, str] = {}
        for key, owns in entries.items():
            for n, original in enumerate(originals.get(key, [])):
                mapping[original] = owns[min(n, len(owns) - 1)]  # every entry of a weight that the stage uses twice
            if key in parameters:
                places.setdefault(key, []).append((k, owns[0]))
        names.append(mapping)
    tied = [Tied(tuple(originals[i]), tuple(where)) for i, where in places.items() if len(where) > 1]
    return names, tied


def untie(stages: Sequence[nn.Module]) -> tuple[list[nn.Module], list[Tied]]:
    """Stages that share no parameter, and which of their parameters were one.

    Each stage after the first that holds a parameter gets a copy of it, in the stage itself unless modules are shared as well.
    The stages carry what was one, and pipelines keep it equal. Make optimizers afterwards.

    Args:
        stages: modules that run one after the other.

    Raises:
        ConfigError: they are no list of modules.

    Example:
        >>> import torch, pipeoptim as po
        >>> embed, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        >>> head.weight = embed.weight
        >>> stages, tied = po.untie([embed, head])
        >>> tied[0].places
        ((0, 'weight'), (1, 'weight'))
        >>> pipe = po.Emulator(stages, torch.optim.AdamW, nn.functional.cross_entropy)
    """
    if not isinstance(stages, (list, tuple, nn.Sequential, nn.ModuleList)) or not all(
        isinstance(stage, nn.Module) for stage in stages
    ):
        raise ConfigError(f"untie() was given {stages!r}, must be given the list of the stages' modules")
    _, tied = find_parameter_places(nn.ModuleList(stages), stages)
    separate = without_sharing(stages)
    if tied:
        note_ties(separate, tied)
    return separate, tied


def without_sharing(stages: Sequence[nn.Module]) -> list[nn.Module]:
    """Stages that share nothing: each after the first that holds a parameter or buffer gets a copy of its own, tied within the
    stage as before."""
    seen: set[int] = set()
    modules: set[int] = set()
    result = []
    for stage in stages:
        # Shared modules need copies of their own: a slot hangs on a module, not on a stage.
        own = shadow_copy(stage) if modules & {id(m) for m in stage.modules()} else stage
        copies: dict[int, Tensor] = {}
        held = weight_slots(own)
        tensors = [slot.tensor for slot in held]
        for slot, tensor in zip(held, tensors, strict=True):
            if id(tensor) in seen:
                if id(tensor) not in copies:
                    copies[id(tensor)] = _copy(tensor)
                slot.put(copies[id(tensor)])
        seen |= {id(tensor) for tensor in tensors}
        modules |= {id(m) for m in own.modules()}
        result.append(own)
    return result


def _copy(tensor: Tensor) -> Tensor:
    copy = tensor.detach().clone()
    return nn.Parameter(copy, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy
