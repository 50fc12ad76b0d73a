"""The file of one stage in a checkpoint: its tensors as safetensors, all else as JSON in the header. Nothing in it is ever pickled.

A safetensors file knows shapes but no strides. A tensor whose elements lie in memory in another order than that of its dimensions
(channels last, a transposed weight) is written in the order of memory, and its shape and strides are noted beside it: a kernel that
steps a weight and its state in one pass needs both in the same order, also after a resume.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeoptim.checkpoint.plain_data import flatten, rebuild
from pipeoptim.errors import ConfigError


def stage_file(k: int) -> str:
    """Name of the file of stage ``k``."""
    return f"stage-{k}.safetensors"


def write_stage(path: Path, state: Mapping[str, Any]) -> None:
    """Write ``state``, tensors and plain data in nested containers.

    Raises:
        ConfigError: it holds something else.
    """
    tensors: dict[str, Tensor] = {}
    plain = flatten(dict(state), "", tensors)
    stored: dict[str, Tensor] = {}
    reordered: dict[str, list[tuple[int, ...]]] = {}
    memory: set[int] = set()
    for name, tensor in tensors.items():
        if _is_reordered(tensor):
            reordered[name] = [tuple(tensor.shape), tensor.stride()]
            stored[name] = tensor.detach().as_strided((tensor.numel(),), (1,))
        else:
            stored[name] = tensor.detach().contiguous()
        start = stored[name].untyped_storage().data_ptr()
        if start in memory:  # safetensors refuses two names for one memory
            stored[name] = stored[name].clone()
        memory.add(start)
    save_file(stored, path, metadata={"state": json.dumps(plain), "reordered": json.dumps(reordered)})


def read_stage(path: Path) -> dict[str, Any]:
    """What :func:`write_stage` wrote, on the CPU.

    Raises:
        ConfigError: the file was not written by it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
        for name, (shape, stride) in json.loads(metadata["reordered"]).items():
            tensors[name] = tensors[name].as_strided(shape, stride)
        state: dict[str, Any] = rebuild(json.loads(metadata["state"]), tensors)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(
            f"{path} is no stage of a checkpoint ({type(error).__name__}: {error}); choose another one"
        ) from error
    return state


def _is_reordered(tensor: Tensor) -> bool:
    """Whether its elements lie in memory without gaps, but not in the order of its dimensions."""
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=strides.__getitem__, reverse=True)
    return not tensor.is_contiguous() and tensor.permute(order).is_contiguous()
