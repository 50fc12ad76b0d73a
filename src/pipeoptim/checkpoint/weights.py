"""The weights of a pipeline as the unpipelined model has them: one state_dict, or safetensors files that other tools read.

``save_weights`` writes what Hugging Face's ``from_pretrained`` reads: one file per stage and an index of which name is where.
``load_weights`` reads such a folder (or one that was published) into one stage: only the tensors that the stage has, so no
process ever holds the whole model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeoptim.checkpoint.parameter_names import Names, inverted, merge, original_names
from pipeoptim.checkpoint.saving_group import SavingGroup, checked, refuse_sharded, saving_group
from pipeoptim.errors import ConfigError
from pipeoptim.files import as_path, cause_of, make_folder, sync_folder, sync_tree, write_durably

if TYPE_CHECKING:
    from pipeoptim.engine.pipeline import Pipeline

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def full_state_dict(pipe: Pipeline, names: Names | None = None) -> dict[str, Tensor] | None:
    """The latest weights and buffers of all stages under their names in the original model, on the CPU.

    Drains first. With one process per stage all call it; the process of stage 0 gets everything, the others None. It then holds
    the whole model: :func:`save_weights` needs no process that does. A weight that several stages have is the first one's. Where
    ``fully_shard`` spread stages over replicas, all replicas call it.

    Args:
        pipe: an ``Emulator`` or ``Schedule``.
        names: for every stage, name in the original model -> name in the stage (``Partition.names``). By default the stages'
            own names, which are the original ones for slices of an ``nn.Sequential``; where two stages share a name, those
            of ``nn.Sequential(*stages)``.

    Raises:
        ConfigError: ``names`` does not cover a stage.

    Example:
        >>> import torch, pipeoptim as po
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
        >>> pipe = po.Emulator([model[:1], model[1:]], lambda p: torch.optim.SGD(p, lr=0.1), torch.nn.functional.mse_loss)
        >>> model.load_state_dict(po.full_state_dict(pipe))
        <All keys matched successfully>
    """
    checked(pipe, "full_state_dict", names)
    pipe.drain()
    found = original_names(pipe, names)
    states = {k: {name: _copied_to_cpu(t) for name, t in _stage_tensors(pipe.stage_module(k), k)} for k in pipe.local_stages}
    parts = saving_group(pipe).gather_at_first((found, states))
    if parts is None:
        return None
    everywhere = [{k: own for part in parts for k, own in part[n].items()} for n in (0, 1)]
    return merge(*everywhere)


def save_weights(pipe: Pipeline, folder: str | Path, names: Names | None = None) -> None:
    """Write the latest weights and buffers as safetensors, a file per stage, under their names in the original model.

    Drains first. With one process per stage all call it, and each writes its own file. The folder is written beside its place
    and renamed when complete. Weights that the model uses twice are written once, under their first name and from the first stage
    that has them, as safetensors asks and ``from_pretrained`` expects.

    Args:
        pipe, names: as in :func:`full_state_dict`.
        folder: must not exist.

    Raises:
        ConfigError: the folder exists, ``names`` does not cover a stage, or a stage is sharded over its replicas.

    Example:
        >>> import tempfile, torch, pipeoptim as po
        >>> stages = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)]
        >>> pipe = po.Emulator(stages, lambda p: torch.optim.SGD(p, lr=0.1), torch.nn.functional.mse_loss)
        >>> folder = tempfile.mkdtemp() + "/weights"
        >>> po.save_weights(pipe, folder)
        >>> po.load_weights(torch.nn.Sequential(*stages), folder)
    """
    from safetensors.torch import save_file

    checked(pipe, "save_weights", names)
    folder = as_path("folder", folder)
    pipe.drain()
    processes, names_of = saving_group(pipe), original_names(pipe, names)
    refuse_sharded(pipe, processes)
    part = begin_folder(folder, processes)
    where: dict[str, tuple[str, int]] = {}
    # A tied weight is written by one stage only, which all processes must agree on.
    first = _first_stages(processes.gather(names_of))
    for k in pipe.local_stages:
        once = ((names_of[k][name][0], t) for name, t in _without_aliases(_stage_tensors(pipe.stage_module(k), k)))
        tensors = {original: _copied_to_cpu(t).contiguous() for original, t in once if first[original] == k}
        file = f"model-{k + 1:05d}-of-{pipe.depth:05d}.safetensors"
        save_file(tensors, part / file, metadata={"format": "pt"})
        where |= {name: (file, t.numel() * t.element_size()) for name, t in tensors.items()}
    found = {name: entry for others in processes.gather(where) for name, entry in others.items()}
    if processes.is_first:
        index = {
            "metadata": {"total_size": sum(size for _, size in found.values())},
            "weight_map": {name: file for name, (file, _) in found.items()},
        }
        write_durably(part / INDEX, json.dumps(index, indent=1) + "\n")
    finish_folder(part, folder, processes)


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
        names: name in the file -> name in the module (``Partition.names[k]``); the same names by default.
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
    wanted = inverted(names) if names is not None else {}
    own = module.state_dict()
    where = {name: wanted.get(name, [name]) for name in own}
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


def begin_folder(folder: Path, processes: SavingGroup) -> Path:
    """The folder beside ``folder`` that is renamed when complete; every process gets the error if there is one.

    Raises:
        ConfigError: ``folder`` exists, or cannot be made.
    """
    refusal, part = "", folder.parent / f".{folder.name}.part"
    try:
        if processes.is_first and folder.exists():
            refusal = f"{folder} exists already; choose another folder, or remove it"
        elif processes.is_first:
            shutil.rmtree(part, ignore_errors=True)
            make_folder(part)
    except OSError as error:
        refusal = f"{folder} cannot be made ({cause_of(error)}); choose another folder"
    for reason in filter(None, processes.gather(refusal)):
        raise ConfigError(reason)
    return part


def finish_folder(part: Path, folder: Path, processes: SavingGroup) -> None:
    """Give a complete folder its name; it is on the disk, under that name, when this returns in any process."""
    processes.barrier()
    if processes.is_first:
        sync_tree(part)  # before the name: it must never stand for files that a power cut has emptied
        part.rename(folder)
        sync_folder(folder.parent)
    processes.barrier()


def _device(given: torch.device | str | None) -> torch.device:
    try:
        return torch.device("cpu" if given is None else given)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"device is {given!r}, must be a device of torch, for example 'cpu'") from error


def _first_stages(parts: Sequence[Mapping[int, Mapping[str, Sequence[str]]]]) -> dict[str, int]:
    """Original name -> the first stage that has it."""
    everywhere = {k: own for part in parts for k, own in part.items()}
    return merge(everywhere, {k: dict.fromkeys(own, k) for k, own in everywhere.items()})


def _stage_tensors(module: nn.Module, k: int) -> Iterable[tuple[str, Tensor]]:
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            raise ConfigError(f"stage {k} has {name!r} in its state_dict, a {type(value).__name__}; only tensors are saved")
        yield name, value


def _copied_to_cpu(tensor: Tensor) -> Tensor:
    whole: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)  # of a shard; its replicas all ask
    return (tensor.detach() if whole is None else whole().detach()).to("cpu", copy=True)


def _without_aliases(tensors: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
    """Without tensors that share their memory with an earlier one."""
    seen: set[tuple[Any, ...]] = set()
    for name, t in tensors:
        key = (t.untyped_storage().data_ptr(), t.storage_offset(), t.shape, t.stride()) if t.numel() else (name,)
        if key not in seen:
            seen.add(key)
            yield name, t


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
