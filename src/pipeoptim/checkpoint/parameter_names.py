"""Names of a stage's weights in the model that the stages were cut from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from torch import nn

from pipeoptim.checkpoint.saving_group import saving_group
from pipeoptim.engine.stage.origin import find_origins
from pipeoptim.errors import ConfigError

if TYPE_CHECKING:
    from pipeoptim.engine.pipeline import Pipeline

_WRAPPERS = "OptimizedModule", "DistributedDataParallel"  # by name: to import the first takes torch a second

T = TypeVar("T")
Names = Sequence[Mapping[str, str]]
"""For every stage: name in the original model -> name in the stage (``Partition.names``)."""


def original_names(pipe: Pipeline, names: Names | None) -> dict[int, dict[str, list[str]]]:
    """For every stage of this process: name in the stage -> its names in the original model, of all of its ``state_dict``.

    A weight that the original model uses twice has two names there. Without ``names``, stages of ``partition`` carry theirs. Of others,
    slices of an ``nn.Sequential`` keep its names, so names that no two stages share are taken for the original ones. Where two stages do
    share one, the original is taken to be ``nn.Sequential(*stages)``. What ``torch.compile`` or DDP has put around a whole stage is in
    no name.

    Raises:
        ConfigError: ``names`` does not cover a stage, or contradicts what it carries.

    Example:
        >>> import torch, pipeoptim as po
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1, bias=False))
        >>> sgd = lambda p: torch.optim.SGD(p, lr=0.1)
        >>> original_names(po.Emulator([model[:1], model[1:]], sgd, nn.functional.mse_loss), None)
        {0: {'0.weight': ['0.weight'], '0.bias': ['0.bias']}, 1: {'1.weight': ['1.weight']}}
        >>> original_names(po.Emulator([model[0], model[1]], sgd, nn.functional.mse_loss), None)
        {0: {'weight': ['0.weight'], 'bias': ['0.bias']}, 1: {'weight': ['1.weight']}}
    """
    if names is not None:
        return {k: _original_names_given(k, pipe.stage_module(k), names) for k in pipe.local_stages}
    own = {k: list(pipe.stage_module(k).state_dict()) for k in pipe.local_stages}
    carried = {k: carried_names(pipe.stage_module(k)) for k in pipe.local_stages}
    inner = {k: {name: without_wrapper(pipe.stage_module(k), name) for name in entries} for k, entries in own.items()}
    unnamed = {k: [inner[k][name] for name in entries if name not in carried[k]] for k, entries in own.items()}
    # All processes gather, so that all decide alike.
    often = Counter(name for part in saving_group(pipe).gather(unnamed) for entries in part.values() for name in entries)
    unique = max(often.values(), default=1) == 1
    return {
        k: {name: carried[k].get(name) or [inner[k][name] if unique else f"{k}.{inner[k][name]}"] for name in entries}
        for k, entries in own.items()
    }


def without_wrapper(module: nn.Module, name: str) -> str:
    """``name`` of an entry of ``module`` as it is inside of what was put around all of it.

    Example:
        >>> import torch
        >>> without_wrapper(torch.compile(nn.Linear(1, 1)), "_orig_mod.weight")
        'weight'
    """
    for attribute in ("_orig_mod", "module"):  # of torch.compile, of DistributedDataParallel
        inside = module._modules.get(attribute)
        if inside is not None and len(module._modules) == 1 and type(module).__name__ in _WRAPPERS:
            return without_wrapper(inside, name.removeprefix(f"{attribute}."))
    return name


def carried_names(module: nn.Module) -> dict[str, list[str]]:
    """Entry of a stage's ``state_dict`` -> its names in the original model, as far as ``partition`` has noted them on the stage or, where
    this is wrapped, on the stage inside."""
    found: dict[str, list[str]] = {}
    for path, _, origin in find_origins(module):
        own = inverted(origin.names or {})
        found |= {f"{path}.{name}" if path else name: originals for name, originals in own.items()}
    return found


def unique_names(pipe: Pipeline, names: Names | None) -> dict[int, dict[str, str]]:
    """As :func:`original_names`, one name for each weight, and no two alike: a second stage's copy of a tied weight gets ``@1``.

    Entries of a stage that are the same weight have the same name.
    """
    found = original_names(pipe, names)
    everywhere = {k: own for part in saving_group(pipe).gather(found) for k, own in part.items()}
    seen: Counter[str] = Counter()
    result: dict[int, dict[str, str]] = {}
    for k in sorted(everywhere):
        firsts = dict.fromkeys(originals[0] for originals in everywhere[k].values())
        result[k] = {own: _with_copy_number(o[0], seen[o[0]]) for own, o in everywhere[k].items()}
        seen.update(firsts.keys())
    return {k: _one_name_per_parameter(pipe.stage_module(k), result[k]) for k in found}


def _one_name_per_parameter(module: nn.Module, named: dict[str, str]) -> dict[str, str]:
    first: dict[int, str] = {}
    same = {own: id(p) for own, p in module.named_parameters(remove_duplicate=False)}
    return {own: first.setdefault(same[own], name) if own in same else name for own, name in named.items()}


def saved_name(name: str, known: Collection[str]) -> str:
    """The name under which a checkpoint holds a copy of a tied weight: that of the weight itself, if it was saved with fewer copies.

    Example:
        >>> saved_name("wte.weight@1", {"wte.weight"})
        'wte.weight'
    """
    return name.rpartition("@")[0] if "@" in name and name not in known else name


def _with_copy_number(name: str, n: int) -> str:
    return f"{name}@{n}" if n else name


def _original_names_given(k: int, module: nn.Module, names: Names) -> dict[str, list[str]]:
    if k >= len(names):
        raise ConfigError(f"names has {len(names)} entries, but there is a stage {k}; give one mapping per stage")
    own, found = module.state_dict(keep_vars=True), inverted(names[k])
    missing = [name for name in own if name not in found]
    if missing:
        raise ConfigError(
            f"names[{k}] says nothing of {len(missing)} entries of stage {k}'s state_dict (first: {missing[0]!r}); "
            "map every original name to its name in the stage"
        )
    # Other original names are a renaming, which is welcome; the same ones for other weights are those of another stage or cut.
    for name, originals in carried_names(module).items():
        wrong = next((o for o in originals if name in own and own.get(names[k].get(o, name)) is not own[name]), None)
        if wrong is not None:
            raise ConfigError(
                f"names[{k}] says that {wrong!r} is {names[k][wrong]!r} of stage {k}, which was cut from the model with that weight as "
                f"{name!r}; leave names out, for the stages carry them"
            )
    return {name: found[name] for name in own}


def inverted(names: Mapping[str, str]) -> dict[str, list[str]]:
    """Name in the stage -> all its names in the original model.

    Example:
        >>> inverted({"wte.weight": "emb.weight", "lm_head.weight": "emb.weight"})
        {'emb.weight': ['wte.weight', 'lm_head.weight']}
    """
    found: dict[str, list[str]] = {}
    for original, own in names.items():
        found.setdefault(own, []).append(original)
    return found


def merge(names: Mapping[int, Mapping[str, Sequence[str]]], states: Mapping[int, Mapping[str, T]]) -> dict[str, T]:
    """What stages have by their own names, by those of the original model; of a name that several have, the first one's.

    Args:
        names: stage -> name in the stage -> its names in the original model.
        states: stage -> name in the stage -> anything.

    Raises:
        ConfigError: a state lacks a name.

    Example:
        >>> merge({0: {"w": ["a", "b"]}, 1: {"w": ["b"], "v": ["c"]}}, {0: {"w": 1}, 1: {"w": 2, "v": 3}})
        {'a': 1, 'b': 1, 'c': 3}
    """
    whole: dict[str, T] = {}
    for k in sorted(names):
        for own, originals in names[k].items():
            if own not in states[k]:
                raise ConfigError(f"the state of stage {k} has no {own!r}; pass the state_dict() of each stage, in order")
            for original in originals:
                whole.setdefault(original, states[k][own])
    return whole
