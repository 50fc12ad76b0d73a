"""Nested state as JSON and a flat set of tensors. Nothing is ever pickled.

Tensors become ``{"$tensor": name}``; what JSON does not have is spelled out (tuples, dictionaries whose keys are no strings,
numbers that are not finite).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipeoptim.errors import ConfigError


def flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` with its tensors moved into ``tensors`` under names that begin with ``path``.

    Raises:
        ConfigError: something that is neither a tensor nor plain data, or two tensors of one name.

    Example:
        >>> import torch
        >>> found = {}
        >>> flatten({"a": [1, torch.ones(1)]}, "x", found), list(found)
        ({'a': [1, {'$tensor': 'x/a/1'}]}, ['x/a/1'])
    """
    if isinstance(value, Tensor):
        if tensors.setdefault(path, value) is not value:
            raise ConfigError(f"two tensors of this state are called {path!r} in the file; rename one of them")
        return {"$tensor": path}
    # JSON has neither NaN nor infinity, and json.dumps would write words that other readers refuse.
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        parts = [flatten(v, f"{path}/{n}", tensors) for n, v in enumerate(value)]
        return {"$tuple": parts} if isinstance(value, tuple) else parts
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: flatten(v, f"{path}/{_escaped(key)}", tensors) for key, v in value.items()}
        return {"$items": [_flat_item(n, k, v, path, tensors) for n, (k, v) in enumerate(value.items())]}
    raise ConfigError(
        f"{path} is of the type {type(value).__name__}, which a checkpoint cannot hold: only tensors and plain data"
    )


def _escaped(key: str) -> str:
    """A key as one piece of a path, as in JSON Pointer (RFC 6901): ``{"a/b": ...}`` is not ``{"a": {"b": ...}}``."""
    return key.replace("~", "~0").replace("/", "~1")


def _flat_item(n: int, key: Any, value: Any, path: str, tensors: dict[str, Tensor]) -> list[Any]:
    """The n-th entry of a dictionary of any keys; of these, only integers stand in paths, since 1 and "1" print alike."""
    piece = str(key) if type(key) is int else f"@{n}"
    return [flatten(key, f"{path}/{piece}key", tensors), flatten(value, f"{path}/{piece}", tensors)]


def rebuild(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What :func:`flatten` was given.

    Example:
        >>> found = {}
        >>> rebuild(flatten({1: (2.0, float("inf"))}, "x", found), found)
        {1: (2.0, inf)}
    """
    if isinstance(value, list):
        return [rebuild(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    if "$float" in value:
        return float(value["$float"])
    if "$tuple" in value:
        return tuple(rebuild(v, tensors) for v in value["$tuple"])
    if "$items" in value:
        return {rebuild(k, tensors): rebuild(v, tensors) for k, v in value["$items"]}
    return {key: rebuild(v, tensors) for key, v in value.items()}


def tensors_in(value: Any) -> set[str]:
    """The names of all tensors that :func:`rebuild` would need."""
    if isinstance(value, list):
        return {name for v in value for name in tensors_in(v)}
    if not isinstance(value, dict):
        return set()
    return {value["$tensor"]} if "$tensor" in value else {name for v in value.values() for name in tensors_in(v)}


def same_plain(first: Any, second: Any) -> bool:
    """Whether two pieces of state are the same, tensors bit for bit.

    Example:
        >>> import torch
        >>> same_plain({"lr": torch.ones(1)}, {"lr": torch.ones(1)}), same_plain([1], (1,))
        (True, False)
    """
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        both = isinstance(first, Tensor) and isinstance(second, Tensor)
        return both and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(same_plain(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)) and type(first) is type(second):
        return len(first) == len(second) and all(same_plain(a, b) for a, b in zip(first, second, strict=True))
    return bool(first == second or (first != first and second != second))  # NaN is as good as NaN
