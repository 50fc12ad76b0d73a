"""Checkpoints that another number of stages can resume from.

Every process writes what it has, as safetensors; beside them lies ``state.json`` with all that is not a tensor. The folder is
written beside its place and renamed when complete. Nothing in it is pickled, so nothing in it can run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.utils._pytree import tree_map_only

from pipeoptim.checkpoint.export_folder import begin_folder, finish_folder
from pipeoptim.checkpoint.named_state import NamedState, check_covered, collect_stage, stage_state, tensors_needed
from pipeoptim.checkpoint.parameter_names import Names, saved_name, unique_names
from pipeoptim.checkpoint.saving_group import SavingGroup, checked, refuse_sharded, saving_group
from pipeoptim.checkpoint.shard_files import read_tensors, shapes_of, write_shard
from pipeoptim.errors import ConfigError
from pipeoptim.files import as_path

if TYPE_CHECKING:
    from pipeoptim.engine.pipeline import Pipeline

T = TypeVar("T")
STATE = "state.json"
FORMAT = 2


def save_sharded(
    pipe: Pipeline, folder: str | Path, names: Names | None = None, *, background: bool = False, overwrite: bool = False
) -> Future[None]:
    """Save everything that training needs to go on: weights, optimizer states, schedules, versions, random streams.

    Drains first. With one process per stage all call it, and each writes its own part.

    Args:
        pipe: an ``Emulator`` or ``Schedule``.
        folder: must not exist, unless ``overwrite``. It appears under its name when it is complete.
        names: for every stage, name in the original model -> name in the stage. By default as in :func:`full_state_dict`; another
            number of stages finds its weights by these names.
        background: return as soon as the state is copied to memory; training goes on while it is written. Wait for
            ``result()`` of what is returned, in all processes, before the next save and before ``pipe.close()``.
        overwrite: an earlier checkpoint in ``folder`` is replaced when the new one is complete; nothing else ever is.

    Returns:
        A future; done already unless ``background``.

    Raises:
        ConfigError: the folder exists, there is state that is neither tensors nor plain data, or a stage is sharded over its
            replicas.

    Example:
        >>> import tempfile, torch, pipeoptim as po
        >>> stages = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)]
        >>> pipe = po.Emulator(stages, lambda p: torch.optim.AdamW(p), torch.nn.functional.mse_loss)
        >>> folder = tempfile.mkdtemp() + "/step-10"
        >>> _ = po.save_sharded(pipe, folder)
        >>> po.load_sharded(pipe, folder)
        True
    """
    checked(pipe, "save_sharded", names)
    for option, value in (("background", background), ("overwrite", overwrite)):
        if not isinstance(value, bool):
            raise ConfigError(f"{option} is {value!r}, must be True or False")
    folder = as_path("folder", folder)
    pipe.drain()
    processes, names_of = saving_group(pipe), unique_names(pipe, names)
    refuse_sharded(pipe, processes)
    part = begin_folder(folder, processes, overwrite, STATE)
    state = NamedState()
    for k in pipe.local_stages:
        collect_stage(pipe.stage_worker(k), names_of[k], state)
    _write_state_json(part, state, pipe.depth, processes)
    everywhere = processes.gather(list(state.tensors))
    before = {name for names in everywhere[: processes.index] for name in names}  # written by those before this process
    tensors = {name: tensor for name, tensor in state.tensors.items() if name not in before}

    def write() -> None:
        write_shard(part, processes.index, len(everywhere), tensors)
        finish_folder(part, folder, processes)

    if background:  # training goes on to change what was collected
        tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        return _in_background(write)
    write()
    done: Future[None] = Future()
    done.set_result(None)
    return done


def load_sharded(pipe: Pipeline, folder: str | Path, names: Names | None = None) -> bool:
    """Continue from :func:`save_sharded`, with the same number of stages or another, in either engine.

    Each process reads only what its stages need. With the same cut the run goes on bit for bit. With another cut every parameter
    keeps its value, its optimizer state, the options of its param group (learning rate, weight decay, ...), its place in the
    learning-rate schedule and what predictors remember of it; the loss scale stays in force. The stages' random streams (dropout)
    and what clipping and compression remember begin anew. Nothing is loaded unless everything can be.

    Args:
        pipe, names: as in :func:`save_sharded`; with nothing in flight.
        folder: what was saved.

    Returns:
        Whether the cut is the same.

    Raises:
        ConfigError: no checkpoint, or one of another model or with other optimizers; or a param group or scheduler of the new
            stages would have parameters that were trained with different options or in different states.

    Example: see :func:`save_sharded`.
    """
    checked(pipe, "load_sharded", names)
    folder, processes, names_of = as_path("folder", folder), saving_group(pipe), unique_names(pipe, names)
    refuse_sharded(pipe, processes)
    saved, depth = processes.agreed(lambda: _read_state_json(folder))
    same = all(
        processes.gather(
            depth == pipe.depth and all(saved.weights.get(k) == list(found.values()) for k, found in names_of.items())
        )
    )
    known = {name for own in saved.weights.values() for name in own}
    names_of = {k: {own: saved_name(name, known) for own, name in found.items()} for k, found in names_of.items()}
    everywhere = processes.gather({k: list(found.values()) for k, found in names_of.items()})
    wanted = processes.agreed(lambda: _wanted_tensors(pipe, names_of, saved, same, folder))
    # The same lists in all processes, so all refuse together, without another exchange.
    check_covered((own for part in everywhere for own in part.values()), saved)
    saved.tensors = processes.agreed(lambda: read_tensors(folder, wanted))
    for k, state in processes.agreed(lambda: _states(pipe, names_of, saved, same)).items():
        pipe.load_stage_state_dict(k, state)
    processes.barrier()
    return same


def _wanted_tensors(
    pipe: Pipeline, names_of: Mapping[int, Mapping[str, str]], saved: NamedState, same: bool, folder: Path
) -> set[str]:
    """The names of those that the stages of this process need; they are in the checkpoint and have the right shapes."""
    wanted = {name for k in pipe.local_stages for name in tensors_needed(pipe.stage_worker(k), names_of[k], saved, same)}
    there = shapes_of(folder)
    missing = sorted(wanted - there.keys())
    if missing:
        raise ConfigError(
            f"the checkpoint {folder} lacks {len(missing)} tensors (first: {missing[0]!r}); it is incomplete, or the stages keep state, "
            "such as master weights, that they did not when it was saved"
        )
    for k, found in names_of.items():
        for own, tensor in pipe.stage_module(k).state_dict().items():
            shape = there[f"model/{found[own]}"]
            if tuple(shape) != tuple(tensor.shape):
                raise ConfigError(
                    f"{found[own]!r} has shape {tuple(shape)} in {folder}, but {tuple(tensor.shape)} in stage {k}; it is of another model"
                )
    return wanted


def _states(
    pipe: Pipeline, names_of: Mapping[int, Mapping[str, str]], saved: NamedState, same: bool
) -> dict[int, dict[str, Any]]:
    """The states of the stages of this process, all made before the first is loaded."""
    states: dict[int, dict[str, Any]] = {}
    seen: set[str] = set()
    for k in pipe.local_stages:
        states[k] = stage_state(pipe.stage_worker(k), names_of[k], saved, same, pipe.depth)
        if seen & set(names_of[k].values()):  # optimizers keep what they load: a copy of a tied weight needs a state of its own
            states[k]["optimizer"] = tree_map_only(torch.Tensor, torch.clone, states[k]["optimizer"])
        seen |= set(names_of[k].values())
    return states


def _write_state_json(part: Path, state: NamedState, depth: int, processes: SavingGroup) -> None:
    """``state.json``: what all processes have that is no tensor."""
    everything = NamedState()
    for other in processes.gather(state.plain()):
        everything.update(other)
    if processes.is_first:
        text = json.dumps({"format": FORMAT, "stages": depth, **everything.plain()}, allow_nan=False)
        (part / STATE).write_text(text + "\n")


def _read_state_json(folder: Path) -> tuple[NamedState, int]:
    try:
        data = json.loads((folder / STATE).read_text())
        found = data.pop("format")
        if found != FORMAT:
            which = "a newer" if found > FORMAT else "an older"
            raise ConfigError(
                f"{folder} was written by {which} version of pipeoptim, in format {found}, and this one reads format {FORMAT}; load it "
                "with the version that wrote it"
            )
        depth = data.pop("stages")
        for name in ("weights", "groups", "schedulers", "predictors", "own"):
            data[name] = {int(k): value for k, value in data[name].items()}
        return NamedState(**data), depth
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{folder} holds no complete sharded checkpoint ({STATE}: {type(error).__name__}: {error}); choose another one"
        ) from error


def _in_background(write: Callable[[], None]) -> Future[None]:
    """``write()`` in a thread; the future holds its end, or its error."""
    writer = ThreadPoolExecutor(1, thread_name_prefix="pipeoptim-save")
    future = writer.submit(write)
    # Takes no more work; the thread ends after this one.
    writer.shutdown(wait=False)
    return future
