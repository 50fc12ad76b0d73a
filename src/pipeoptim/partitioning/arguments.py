"""The arguments of a model as they travel through the stages: by name, and some as their shape only."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_leaves, tree_leaves_with_path, tree_map_with_path

from pipeoptim.engine.splitting import as_fed, split
from pipeoptim.partitioning.absent_tensor import AbsentTensor

_FORM = "form of a tensor"

#: Arguments that are False unless given: a cache of past keys belongs to generation and would live on every stage.
_OFF = ("use_cache",)

Parameters = Mapping[str, inspect.Parameter]
Inputs = tuple[list[Any], dict[str, Any]]


def parameters(model: nn.Module) -> Parameters:
    """Those of the model's forward."""
    return inspect.signature(model.forward).parameters


def bind_arguments(parameters: Parameters, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
    """Positional and keyword arguments, as many as possible by name, without those that are None.

    Example:
        >>> bind_arguments(parameters(torch.nn.Linear(2, 2)), (1,), {})
        ([], {'input': 1})
    """
    plain = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    named: dict[str, Any] = {}
    rest = list(args)
    if not any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
        named = dict(zip(plain, rest, strict=False))
        rest = rest[len(named) :]
    named = {name: value for name, value in {**named, **kwargs}.items() if value is not None}
    return rest, {**{name: False for name in _OFF if name in plain}, **named}


def whole(inputs: Inputs) -> Inputs:
    """A mini-batch as the model takes it: without the marks that say how it is split."""
    return microbatch(inputs, 1)


def microbatch(inputs: Inputs, m: int) -> Inputs:
    """The first of the ``m`` micro-batches of a mini-batch, split as the engine does; no other is larger.

    >>> from pipeoptim.engine.marks import Whole
    >>> microbatch(([torch.arange(5), Whole(torch.arange(5)), 7], {}), 2)
    ([tensor([0, 1, 2]), tensor([0, 1, 2, 3, 4]), 7], {})
    """

    def first(name: str, value: Any) -> Any:
        return split(name, value, m).values[0] if m > 1 else as_fed(name, value)

    args, kwargs = inputs
    return (
        [first(f"sample_args[{n}]", value) for n, value in enumerate(args)],
        {name: first(f"sample_kwargs[{name!r}]", value) for name, value in kwargs.items()},
    )


def tensor_names(inputs: Inputs) -> list[str]:
    """A name for each tensor among the inputs, in the order of their leaves."""
    return [keystr(path) for path, leaf in tree_leaves_with_path(inputs) if isinstance(leaf, Tensor)]


def pack_inputs(inputs: Inputs, form_only: set[str]) -> Any:
    """``inputs`` as they travel: tensors named in ``form_only`` as a few numbers."""

    def leaf(path: Any, value: Any) -> Any:
        if isinstance(value, Tensor) and (isinstance(value, AbsentTensor) or keystr(path) in form_only):
            return (_FORM, str(value.dtype).removeprefix("torch."), *value.shape)
        return value

    return tree_map_with_path(leaf, inputs)


def unpack_inputs(travelled: Any, device: torch.device) -> Inputs:
    """The inputs that :func:`pack_inputs` made into ``travelled``."""

    def leaf(value: Any) -> Any:
        if isinstance(value, tuple) and value and value[0] == _FORM:
            return AbsentTensor.made(value[2:], getattr(torch, value[1]), device)
        return value

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: walk(inner) for name, inner in value.items()}
        made = leaf(value)
        if made is value and isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
            return type(value)(walk(inner) for inner in value)
        return made

    args, kwargs = walk(travelled)
    return list(args), dict(kwargs)


def first_device(tree: Any) -> torch.device:
    """The device of the first tensor in ``tree``; the CPU where there is none."""
    return next((leaf.device for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)), torch.device("cpu"))
