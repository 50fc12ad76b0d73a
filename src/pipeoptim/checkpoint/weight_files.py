"""Weights from safetensors files, written here or published: a stage reads only the tensors that it has, so no process holds the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeoptim.checkpoint.parameter_names import carried_names, inverted, without_wrapper
from pipeoptim.errors import ConfigError
from pipeoptim.files import as_path

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def load_weights(
    module: nn.Module,
    source: str | Path,
    names: Mapping[str, str] | None = None,
    *,
    device: torch.device | str | None = None,
) -> None:
    """Load safetensors into one stage (or a whole model), reading only the tensors that it has.

    Parameters on the meta device are replaced by what the file holds, so a stage can be cut from a model that was built under
    ``torch.device("meta")``; do this before its optimizer is made. Others are overwritten in place, in their own type.

    Args:
        module: what to load into.
        source: a ``.safetensors`` file, or a folder with ``model.safetensors`` or an index beside several files.
        names: name in the file -> name in the module; by default those that a stage of ``partition`` carries, else the same names.
        device: where parameters from the meta device go; the CPU by default.

    Raises:
        ConfigError: no such file, an entry of the module that is not in it, or one of another shape.

    Example: see :func:`save_weights`.
    """
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"load_weights() was given an object of type {type(module).__name__}, must be given a module; for those of a pipeline, "
            "pipe.stage_module(k)"
        )
    if names is not None and not isinstance(names, Mapping):
        raise ConfigError(f"names is {names!r}, must be a dictionary, name in the file -> name in the module")
    source, device = as_path("source", source), _device(device)
    files = _files_of(source)
    wanted = inverted(names) if names is not None else carried_names(module)
    own = module.state_dict()
    where = {name: wanted.get(name) or list(dict.fromkeys((name, without_wrapper(module, name)))) for name in own}
    loaded = _read(files, where, own, source)
    _check_missing(module, loaded, where, source)
    with torch.no_grad():
        for name, tensor in loaded.items():
            if own[name].is_meta:
                _replace_tensor(module, name, tensor.to(device, own[name].dtype))
            else:
                own[name].copy_(tensor)
    left = [name for name, t in [*module.named_parameters(), *module.named_buffers()] if t.is_meta]
    if left:
        raise ConfigError(
            f"{len(left)} tensors are still on the meta device (first: {left[0]!r}), because {source} does not hold them; "
            "build them on a real device before loading"
        )
    if any(tensor.is_meta for tensor in own.values()):  # forms of weights that other stages have follow to the device
        module._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)  # type: ignore[no-untyped-call]


def _device(given: torch.device | str | None) -> torch.device:
    try:
        return torch.device("cpu" if given is None else given)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"device is {given!r}, must be a device of torch, for example 'cpu'") from error


def _files_of(source: Path) -> dict[str, Path]:
    """Name of a tensor -> file that holds it; empty key for a single file that holds all."""
    if source.is_file():
        return {"": source}
    if (source / INDEX).is_file():
        try:
            index = json.loads((source / INDEX).read_text(encoding="utf-8"))["weight_map"]
            return {name: source / file for name, file in index.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(
                f"{source / INDEX} is no index of weights ({type(error).__name__}: {error}); restore it, or load the files one by one"
            ) from error
    if (source / SINGLE).is_file():
        return {"": source / SINGLE}
    raise ConfigError(f"there are no weights in {source}; expected a .safetensors file, or a folder with {SINGLE} or {INDEX}")


def _read(files: dict[str, Path], where: Mapping[str, list[str]], own: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    loaded: dict[str, Tensor] = {}
    for file in dict.fromkeys(files.values()):
        with _opened(file) as opened:
            there = set(opened.keys())
            for name, originals in where.items():
                original = next((o for o in originals if o in there and files.get(o, files.get("")) == file), None)
                if original is None:
                    continue
                shape = tuple(opened.get_slice(original).get_shape())
                if shape != tuple(own[name].shape):
                    raise ConfigError(
                        f"{original!r} has shape {shape} in {source}, but {tuple(own[name].shape)} in the module ({name!r})"
                    )
                loaded[name] = opened.get_tensor(original)
    return loaded


def _opened(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file} cannot be read as safetensors ({' '.join(str(error).split())}); restore it") from error


def _check_missing(module: nn.Module, loaded: Mapping[str, Tensor], where: Mapping[str, list[str]], source: Path) -> None:
    """Raises ConfigError for entries that were not loaded; a tensor that was loaded under another of its names is not missing."""
    tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    there = {id(tensors[name]) for name in loaded}
    missing = [name for name in where if id(tensors[name]) not in there]
    if missing:
        raise ConfigError(
            f"{source} does not hold {len(missing)} of the {len(where)} entries of the module "
            f"(first: {missing[0]!r}, looked for as {' or '.join(where[missing[0]])}); give names: original -> name in the module"
        )


def _replace_tensor(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter or buffer on the meta device, wherever the module refers to it."""
    path, _, leaf = name.rpartition(".")
    old = getattr(module.get_submodule(path), leaf)
    new: Any = nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for key, entry in table.items():
                if entry is old:
                    table[key] = new
