"""The weights of a pipeline as the unpipelined model has them: one state_dict, or safetensors files that other tools read.

``save_weights`` writes what Hugging Face's ``from_pretrained`` reads: one file per stage and an index of which name is where, so no
process ever holds the whole model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeoptim.checkpoint.equal_copies import refuse_unequal_copies
from pipeoptim.checkpoint.export_folder import begin_folder, check_folder, finish_folder
from pipeoptim.checkpoint.parameter_names import Names, carried_names, merge, original_names
from pipeoptim.checkpoint.saving_group import checked, refuse_sharded, saving_group
from pipeoptim.checkpoint.weight_files import INDEX
from pipeoptim.engine.stage.origin import find_origins
from pipeoptim.errors import ConfigError
from pipeoptim.files import as_path, write_durably

if TYPE_CHECKING:
    from pipeoptim.engine.pipeline import Pipeline

CONFIG = "config.json"


def full_state_dict(pipe: Pipeline, names: Names | None = None) -> dict[str, Tensor] | None:
    """The latest weights and buffers of all stages under their names in the original model, on the CPU.

    Drains first. With one process per stage all call it; the process of stage 0 gets everything, the others None. It then holds
    the whole model: :func:`save_weights` needs no process that does. Tied weights are there under each of
    their names. Where ``fully_shard`` spread stages over replicas, all replicas call it.

    Args:
        pipe: an ``Emulator`` or ``Schedule``.
        names: for every stage, name in the original model -> name in the stage. Not needed for stages of ``partition``, which carry
            theirs. By default those, or else the stages' own names, which are the original ones for slices of an ``nn.Sequential``;
            where two stages share a name, those of ``nn.Sequential(*stages)``.

    Raises:
        ConfigError: ``names`` does not cover a stage or contradicts what it carries, a stage lacks an entry that it was cut with, or
            copies of one weight differ.

    Example:
        >>> import torch, pipeoptim as po
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
        >>> pipe = po.Emulator([model[:1], model[1:]], lambda p: torch.optim.SGD(p, lr=0.1), torch.nn.functional.mse_loss)
        >>> model.load_state_dict(po.full_state_dict(pipe))
        <All keys matched successfully>
    """
    checked(pipe, "full_state_dict", names)
    pipe.drain()
    processes = saving_group(pipe)
    found = processes.agreed(lambda: original_names(pipe, names))
    processes.agreed(lambda: _refuse_lost(pipe, names))
    refuse_unequal_copies(pipe, found, processes, _copied_to_cpu)
    states = {k: {name: _copied_to_cpu(t) for name, t in _stage_tensors(pipe.stage_module(k), k)} for k in pipe.local_stages}
    parts = processes.gather_at_first((found, states))
    if parts is None:
        return None
    everywhere = [{k: own for part in parts for k, own in part[n].items()} for n in (0, 1)]
    return merge(*everywhere)


def save_weights(
    pipe: Pipeline,
    folder: str | Path,
    names: Names | None = None,
    *,
    also_save: Sequence[Any] = (),
    overwrite: bool = False,
) -> None:
    """Write the latest weights and buffers as safetensors, a file per stage, under their names in the original model.

    Drains first. With one process per stage all call it, and each writes its own file. The folder is written beside its place
    and renamed when complete. Weights that the model uses twice are written once, under their first name and from the first stage
    that has them, as safetensors asks and ``from_pretrained`` expects. For a model of Hugging Face Transformers that ``partition``
    cut, ``config.json`` and ``generation_config.json`` lie beside them, so that ``from_pretrained(folder)`` gives the trained model.

    Args:
        pipe, names: as in :func:`full_state_dict`.
        folder: must not exist, unless ``overwrite``.
        also_save: what has a ``save_pretrained(folder)`` and belongs to the model, such as its tokenizer; needed in the process of
            stage 0.
        overwrite: an earlier export in ``folder`` is replaced when the new one is complete; nothing else ever is.

    Raises:
        ConfigError: the folder exists, a stage is sharded over its replicas, or as :func:`full_state_dict`. :func:`check_export` says so
            before training.

    Example:
        >>> import tempfile, torch, pipeoptim as po
        >>> stages = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)]
        >>> pipe = po.Emulator(stages, lambda p: torch.optim.SGD(p, lr=0.1), torch.nn.functional.mse_loss)
        >>> folder = tempfile.mkdtemp() + "/weights"
        >>> po.save_weights(pipe, folder)
        >>> po.load_weights(torch.nn.Sequential(*stages), folder)
    """
    from pipeoptim.checkpoint.tensor_file import save_tensors

    checked(pipe, "save_weights", names)
    check_export(pipe, folder, names, also_save=also_save, overwrite=overwrite)
    folder = as_path("folder", folder)
    pipe.drain()
    processes, names_of = saving_group(pipe), original_names(pipe, names)
    refuse_unequal_copies(pipe, names_of, processes, _copied_to_cpu)
    part = begin_folder(folder, processes, overwrite, INDEX)
    where: dict[str, tuple[str, int]] = {}
    # A tied weight is written by one stage only, which all processes must agree on.
    first = _first_stages(processes.gather(names_of))
    for k in pipe.local_stages:
        once = ((names_of[k][name][0], t) for name, t in _without_aliases(_stage_tensors(pipe.stage_module(k), k)))
        tensors = {original: _copied_to_cpu(t).contiguous() for original, t in once if first[original] == k}
        file = f"model-{k + 1:05d}-of-{pipe.depth:05d}.safetensors"
        save_tensors(part / file, tensors)
        where |= {name: (file, t.numel() * t.element_size()) for name, t in tensors.items()}
    found = {name: entry for others in processes.gather(where) for name, entry in others.items()}
    if processes.is_first:
        index = {
            "metadata": {"total_size": sum(size for _, size in found.values())},
            "weight_map": {name: file for name, (file, _) in found.items()},
        }
        write_durably(part / INDEX, json.dumps(index, indent=1) + "\n")
        _write_description(pipe, part)
        for described in also_save:
            described.save_pretrained(part)
    finish_folder(part, folder, processes)


def check_export(
    pipe: Pipeline,
    folder: str | Path,
    names: Names | None = None,
    *,
    also_save: Sequence[Any] = (),
    overwrite: bool = False,
) -> None:
    """Refuse now what :func:`save_weights` with the same arguments would refuse after training. Leaves nothing behind and drains nothing.

    With one process per stage all call it.

    Args:
        pipe, folder, names, also_save, overwrite: as in :func:`save_weights`.

    Raises:
        ConfigError: as :func:`save_weights`, but for copies that come to differ later.

    Example:
        >>> import tempfile, torch, pipeoptim as po
        >>> pipe = po.Emulator([torch.nn.Linear(2, 1)], lambda p: torch.optim.SGD(p, lr=0.1), torch.nn.functional.mse_loss)
        >>> po.check_export(pipe, tempfile.mkdtemp() + "/weights")
    """
    checked(pipe, "check_export", names)
    folder, processes = as_path("folder", folder), saving_group(pipe)
    if not isinstance(overwrite, bool):
        raise ConfigError(f"overwrite is {overwrite!r}, must be True or False")

    def own_stages() -> None:
        if not isinstance(also_save, (list, tuple)) or not all(map(_describes_a_model, also_save)):
            raise ConfigError(
                f"also_save is {also_save!r}, must be a list of what has save_pretrained(folder) and is no model, such as a tokenizer"
            )
        original_names(pipe, names)
        _refuse_lost(pipe, names)

    processes.agreed(own_stages)
    refuse_sharded(pipe, processes)
    check_folder(folder, processes, overwrite, INDEX)


def _first_stages(parts: Sequence[Mapping[int, Mapping[str, Sequence[str]]]]) -> dict[str, int]:
    """Original name -> the first stage that has it."""
    everywhere = {k: own for part in parts for k, own in part.items()}
    return merge(everywhere, {k: dict.fromkeys(own, k) for k, own in everywhere.items()})


def _describes_a_model(given: Any) -> bool:
    return callable(getattr(given, "save_pretrained", None)) and not isinstance(given, nn.Module)


def _refuse_lost(pipe: Pipeline, names: Names | None) -> None:
    """Raises ConfigError where a stage lacks an entry that it was cut with: ``from_pretrained`` would put random weights in its place."""
    for k in () if names is not None else pipe.local_stages:
        module = pipe.stage_module(k)
        lost = [name for name in carried_names(module) if name not in module.state_dict()]
        if lost:
            raise ConfigError(
                f"stage {k} was cut with {lost[0]!r} in its state_dict, which is not there any more, as when adapters wrap a layer: merge "
                "or remove what was added, or give names="
            )


def _write_description(pipe: Pipeline, folder: Path) -> None:
    """What ``partition`` has noted of the model as files for ``from_pretrained``, with the present type of the weights."""
    modules = [pipe.stage_module(k) for k in pipe.local_stages]
    files = next((origin.files for module in modules for _, _, origin in find_origins(module) if origin.files), {})
    for name, text in files.items():
        if name == CONFIG:
            dtype = next((p.dtype for module in modules for p in module.parameters() if p.is_floating_point()), torch.float32)
            described = json.loads(text)
            described["torch_dtype" if "torch_dtype" in described else "dtype"] = str(dtype).removeprefix("torch.")
            text = json.dumps(described, indent=2, sort_keys=True) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


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
