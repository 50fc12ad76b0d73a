"""The file of one stage in a checkpoint of a run: its tensors, and all else as JSON in the header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeoptim.checkpoint.plain_data import flatten, rebuild
from pipeoptim.checkpoint.tensor_file import open_tensors, write_tensors


def stage_file(k: int) -> str:
    """Name of the file of stage ``k``."""
    return f"stage-{k}.safetensors"


def pack_stage(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """``state``, tensors and plain data in nested containers, as tensors and as text that later changes of it do not reach.

    Raises:
        ConfigError: it holds something else.
    """
    tensors: dict[str, Tensor] = {}
    plain = flatten(dict(state), "", tensors)
    return tensors, {"state": json.dumps(plain)}


def write_stage(path: Path, state: Mapping[str, Any]) -> None:
    """Write ``state``, as :func:`pack_stage` takes it."""
    write_packed(path, *pack_stage(state))


def write_packed(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write what :func:`pack_stage` gave."""
    write_tensors(path, tensors, metadata)


def read_stage(path: Path) -> dict[str, Any]:
    """What :func:`write_packed` wrote, on the CPU.

    Raises:
        ConfigError: the file was not written by it.
    """
    with open_tensors(path) as file:
        tensors = {name: file.tensor(name) for name in file.names}
        state: dict[str, Any] = rebuild(json.loads(file.metadata["state"]), tensors)
        return state
