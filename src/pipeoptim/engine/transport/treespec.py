"""Structures of nested containers as plain data (JSON), so that nothing a process receives is ever unpickled.

A description names classes, and a name that arrives could name anything. So it is never imported: it only selects among the
classes that this process has registered with ``torch.utils._pytree`` by itself, and the named tuples of modules that it has loaded.
"""

from __future__ import annotations

import math
import sys
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import SUPPORTED_NODES, TreeSpec, is_namedtuple_class, tree_flatten

from pipeoptim.errors import ConfigError

_FACTORIES = {"list": list, "dict": dict, "set": set, "int": int, "float": float, "str": str, "tuple": tuple}
"""What a ``defaultdict`` may make; any other factory is a function, which no description carries."""

_TORCH_CONSTANTS = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


def describe_spec(spec: TreeSpec) -> Any:
    """``spec`` as plain data: None for a leaf, else the class, its context and the children.

    Raises:
        ConfigError: a container is of a class that the receiver could not find by its name.
    """
    if spec.is_leaf():
        return None
    # Of a named tuple the context is the class itself; of other containers it is data, such as the keys of a dict.
    context = _class_name(spec.context, _namedtuple_class) if spec.type is namedtuple else describe_value(spec.context)
    return [_class_name(spec.type, _registered_class), context, [describe_spec(child) for child in spec.children()]]


def parse_spec(node: Any) -> TreeSpec:
    """The structure that :func:`describe_spec` described.

    Raises:
        ConfigError: this process does not know one of its classes.
    """
    if node is None:
        return tree_flatten(None)[1]
    name, context, children = node
    kind = _registered_class(name)
    found = _namedtuple_class(context) if kind is namedtuple else parse_value(context)
    return TreeSpec(kind, found, [parse_spec(child) for child in children])


def describe_value(value: Any) -> Any:
    """``value``, of the plain types that pass between stages (and containers of them), as what JSON has.

    Raises:
        ConfigError: it is of another type.
    """
    kind = type(value)  # exactly: of a subclass only the value would arrive
    if value is None or kind in (bool, int, str) or (kind is float and math.isfinite(value)):
        return value
    if kind is list:
        return [describe_value(one) for one in value]
    # Infinity and NaN, which JSON has no numbers for.
    if kind is float:
        return {"float": str(value)}
    if kind is tuple:
        return {"tuple": [describe_value(one) for one in value]}
    if kind is dict:
        return {"dict": [[describe_value(k), describe_value(v)] for k, v in value.items()]}
    if kind is complex:
        return {"complex": [describe_value(value.real), describe_value(value.imag)]}
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind is torch.device:
        return {"device": str(value)}
    for name, constant in _TORCH_CONSTANTS.items():
        if kind is constant:
            return {name: str(value).removeprefix("torch.")}
    for name, factory in _FACTORIES.items():
        if value is factory:
            return {"factory": name}
    raise ConfigError(
        f"a {kind.__name__} is part of a structure, but only plain data can be described to another process; use None, numbers, "
        "strings, bytes and types of torch"
    )


def parse_value(data: Any) -> Any:
    """The value that :func:`describe_value` described."""
    if isinstance(data, list):
        return [parse_value(one) for one in data]
    if not isinstance(data, dict):
        return data
    ((kind, content),) = data.items()
    if kind in _TORCH_CONSTANTS:
        found = vars(torch).get(content)  # not getattr: what is missing there may be imported
        if isinstance(found, _TORCH_CONSTANTS[kind]):
            return found
        raise ConfigError(
            f"another process named {content!r}, which is no {kind} of this version of torch; run the same version"
        )
    return _PARSERS[kind](content)


_PARSERS: dict[str, Callable[[Any], Any]] = {
    "float": float,
    "tuple": lambda content: tuple(map(parse_value, content)),
    "dict": lambda content: {parse_value(k): parse_value(v) for k, v in content},
    "complex": lambda content: complex(*map(parse_value, content)),
    "bytes": bytes.fromhex,
    "device": torch.device,
    "factory": _FACTORIES.__getitem__,
}


def _class_name(kind: Any, find: Callable[[str], Any]) -> str:
    """How the other process finds the class, where its module is loaded there as well."""
    name = f"{kind.__module__}:{kind.__qualname__}"
    try:
        found = find(name)
    except ConfigError:
        found = None
    if found is not kind:
        raise ConfigError(
            f"a stage returned a structure of class {kind.__qualname__}, which another process cannot find by its name; define its "
            "class at the top of a module, or return tuples, lists and dicts"
        )
    return name


def _registered_class(name: str) -> Any:
    for kind in SUPPORTED_NODES:
        if f"{kind.__module__}:{kind.__qualname__}" == name:
            return kind
    raise _unknown(name)


def _namedtuple_class(name: str) -> Any:
    """Looked up without running anything: no import, and no ``__getattr__`` of a module."""
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = vars(found).get(part) if hasattr(found, "__dict__") else None
    if not is_namedtuple_class(found):
        raise _unknown(name)
    return found


def _unknown(name: str) -> ConfigError:
    module, _, path = name.partition(":")
    return ConfigError(
        f"another process sent a structure of class {path}, which this one does not know; import {module} in all processes before "
        "the pipeline is set up (and register the class with torch.utils._pytree), or return tuples, lists and dicts"
    )
