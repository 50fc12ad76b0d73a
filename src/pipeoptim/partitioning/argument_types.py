"""Arguments of ``partition`` of a wrong type are refused before anything is measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from pipeoptim.errors import ConfigError
from pipeoptim.partitioning.block_costs import BlockCost


def check_types(
    model: Any, sample_kwargs: Any, layers: Any, costs: Any, speeds: Any, memory: Any, bandwidth: Any, group: Any
) -> None:
    """Raises ConfigError for the first argument that ``partition`` cannot use."""
    if not isinstance(model, nn.Module) and not _list_of(nn.Module, model):
        raise ConfigError(f"model is {model!r}, must be a torch.nn.Module, or a list of modules that run one after the other")
    for module in [model] if isinstance(model, nn.Module) else model:
        lazy = next((name for name, tensor in _tensors(module) if nn.parameter.is_lazy(tensor)), None)
        if lazy is not None:
            raise ConfigError(
                f"{lazy!r} of the {type(module).__name__} has no shape yet (a lazy module); run the model once on a mini-batch, then cut it"
            )
    if sample_kwargs is not None and not isinstance(sample_kwargs, Mapping):
        raise ConfigError(f"sample_kwargs is {sample_kwargs!r}, must be a dictionary of the model's keyword arguments")
    if layers is not None and not isinstance(layers, str) and not _list_of(str, layers):
        raise ConfigError(f"layers is {layers!r}, must be a name in the model, or a list of names")
    if costs is not None and not _list_of(BlockCost, costs):
        raise ConfigError(f"costs is {costs!r}, must be a list with one BlockCost per block, as profile() returns")
    for name, values in (("speeds", speeds), ("memory", memory)):
        if values is not None and not _list_of(int | float, values):
            raise ConfigError(f"{name} is {values!r}, must be a list of numbers")
    if bandwidth is not None and not isinstance(bandwidth, int | float):
        raise ConfigError(f"bandwidth is {bandwidth!r}, must be a positive number of bytes per second")
    if group is not None and not isinstance(group, ProcessGroup):
        raise ConfigError(f"group is {group!r}, must be a process group, for example torch.distributed.group.WORLD")


def _list_of(kind: Any, values: Any) -> bool:
    return isinstance(values, (list, tuple)) and all(isinstance(value, kind) for value in values)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
