"""Checkpoints in a training script of one's own: saved every so many mini-batches, found and resumed, whatever has become of the newest."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pipeoptim.checkpoint.background_writer import BackgroundWriter
from pipeoptim.checkpoint.find_checkpoint import load_stage, newest_first
from pipeoptim.checkpoint.health import sick_entry, sick_weight
from pipeoptim.checkpoint.manifest import Meta, OtherFormatError, TornError, read_meta, verify
from pipeoptim.checkpoint.saving_group import checked, refuse_sharded, saving_group
from pipeoptim.checkpoint.script_state import KEY, ScriptState, Stateful
from pipeoptim.checkpoint.stage_files import stage_file
from pipeoptim.errors import ConfigError, DivergedError
from pipeoptim.files import as_path
from pipeoptim.options.checks import count
from pipeoptim.version import __version__

if TYPE_CHECKING:
    from pipeoptim.engine.pipeline import Pipeline

_log = logging.getLogger("pipeoptim")


class Checkpointer:
    """Saves a pipeline every ``every`` mini-batches, and continues from the newest checkpoint that is whole and finite, bit for bit.

    With one process per stage all make one and make the same calls, on a file system that they share. The files are written while
    training goes on; a folder appears under its name when it is complete. A checkpoint is named in a warning and passed over where files
    are missing, cut off or changed, or weights are not finite. Weights that are not finite are never saved.

    Args:
        pipe: an ``Emulator``, ``Schedule`` or ``InterleavedSchedule``, without replicas and ``survive``.
        folder: of the checkpoints, ``step-000100`` and so on.
        every: mini-batches between two checkpoints, at each of which the pipeline drains.
        keep: checkpoints to keep; the newest one always stays.
        state: what else of this process is saved and resumed, by name: objects with ``state_dict()`` and ``load_state_dict()``, such as a
            ``StatefulDataLoader`` or a small class of your own. Tensors and plain data only; nothing is pickled.

    Raises:
        ConfigError: ``pipe`` is no such pipeline; a number is not at least 1; ``state`` cannot be saved; or torchrun would restart
            processes that cannot meet again (:func:`~pipeoptim.init_process_group`).

    Example:
        >>> import tempfile, torch, pipeoptim as po
        >>> folder = tempfile.mkdtemp()
        >>> def train(steps):
        ...     torch.manual_seed(0)
        ...     stages = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)]
        ...     pipe = po.Emulator(stages, lambda p: torch.optim.AdamW(p), torch.nn.functional.mse_loss)
        ...     with po.Checkpointer(pipe, folder, every=4) as checkpoints:
        ...         start = checkpoints.resume()
        ...         for n in range(start, steps):
        ...             pipe.step(torch.ones(2, 2), target=torch.ones(2, 1))
        ...             if checkpoints.after_step(n + 1):
        ...                 break
        ...     return start
        >>> train(6), train(10)
        (0, 4)
    """

    def __init__(
        self, pipe: Pipeline, folder: str | Path, every: int, keep: int = 2, state: Mapping[str, Stateful] | None = None
    ) -> None:
        checked(pipe, "Checkpointer")
        self.pipe, self.folder, self.every = pipe, as_path("folder", folder), count("every", every)
        self._group = saving_group(pipe)
        self._group.refuse_kept_store()
        refuse_sharded(pipe, self._group)
        for option in ("replicas", "survive"):
            if getattr(pipe.options, option, None) is not None:
                raise ConfigError(
                    f"{option} is {getattr(pipe.options, option)!r}, but a Checkpointer saves one pipeline whose processes stay the same; "
                    "use save_sharded, or pipeoptim train"
                )
        self._script = ScriptState({} if state is None else state)
        how = f"{pipe.depth} stages"
        self._writer = BackgroundWriter(
            self.folder, self._group, config=how, keep=count("keep", keep), versions={"pipeoptim": __version__}
        )
        self._continues = False  # what is in the folder, or else it is empty

    def resume(self) -> int:
        """Load the newest checkpoint that every process finds whole and finite; the number of mini-batches it was trained on, 0 for none.

        Raises:
            ConfigError: it has another number of stages, or stages that were cut elsewhere, or other names in ``state``, or is of another
                version of pipeoptim.
        """
        found = self._group.gather([folder.name for folder in newest_first(self.folder)])[0]
        for name in found:
            folder, meta, reason, refusal = self.folder / name, None, None, None
            try:
                meta = self._own_part(folder)
            except TornError as error:
                reason = str(error)
            except ConfigError as error:
                refusal = str(error)
            verdicts = self._group.gather((reason, refusal))
            for _, theirs in verdicts:
                if theirs is not None:
                    raise ConfigError(theirs)
            passed = next((theirs for theirs, _ in verdicts if theirs is not None), None)
            if passed is None and meta is not None:
                for k in self.pipe.local_stages:
                    state = load_stage(folder, k)
                    script = state.pop(KEY, {})
                    self.pipe.load_stage_state_dict(k, state)
                    if k == self.pipe.local_stages[0]:
                        self._script.load(script)
                self._continues = True
                return meta.step
            _log.warning("checkpoint %s is passed over: %s", folder, passed)
        self._continues = True
        return 0

    def after_step(self, step: int) -> bool:
        """After ``step`` mini-batches in all: save, where a checkpoint is due or a stop was requested. Returns whether to stop.

        Raises:
            ConfigError: ``step`` is not at least 1, or the folder holds checkpoints of a run that this one does not resume.
            DivergedError: a weight is not finite; in all processes.
            CheckpointWriteError: the checkpoint before could not be written; in all processes.
        """
        count("step", step)
        if not self._continues:
            self._refuse_other_run()
        stops = self.pipe.stop_requested
        if not stops and step % self.every:
            return False
        self.pipe.drain()
        for sick in filter(None, self._group.gather(sick_weight(self.pipe))):
            raise DivergedError(
                f"the weights of stage {sick[0]} are not finite after {step} mini-batches (first: {sick[1]!r}), and were not saved; lower "
                "the learning rate, or choose another method"
            )
        states = {k: dict(self.pipe.stage_state_dict(k)) for k in self.pipe.local_stages}
        if script := self._script.saved():
            states[self.pipe.local_stages[0]][KEY] = script
        self._writer.begin(step, states)
        return stops

    def close(self) -> None:
        """Wait for the last checkpoint. Call it before ``pipe.close()``; leaving a ``with`` block does."""
        self._writer.finish()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._writer.leave()

    def _own_part(self, folder: Path) -> Meta:
        """The meta data, where what this process needs of ``folder`` is as it was written."""
        try:
            meta = read_meta(folder)
        except OtherFormatError as error:
            raise ConfigError(f"checkpoint {folder} was written by {error.age} version of pipeoptim ({error})") from error
        if meta.stages != self.pipe.depth:  # said before a file is missed that it could not have
            raise ConfigError(
                f"checkpoint {folder} has {meta.stages} stages, the pipeline {self.pipe.depth}; choose another folder, or save with "
                "save_sharded, which another number of stages can load"
            )
        verify(folder, [stage_file(k) for k in self.pipe.local_stages])
        for k in self.pipe.local_stages:
            state, module = load_stage(folder, k), self.pipe.stage_module(k)
            name = _first_other(state["module"], module.state_dict())
            if name is not None:
                raise ConfigError(
                    f"stage {k} of checkpoint {folder} is not that of the pipeline: only one of them has {name!r}, or has it in that "
                    "shape; cut the model as it was cut then (partition without pins measures, and may cut elsewhere: write down pins=), "
                    "or choose another folder"
                )
            name = sick_entry(state, module)
            if name is not None:
                raise TornError(f"{name!r} of stage {k} is not finite")
            if k == self.pipe.local_stages[0]:
                self._script.check(state.get(KEY, {}), folder)
        return meta

    def _refuse_other_run(self) -> None:
        """Before anything is saved beside the checkpoints of another run, of which the next resume would take the newest."""
        others = newest_first(self.folder)
        if others:
            raise ConfigError(
                f"{self.folder} holds checkpoints up to {others[0].name}, which this run does not go on from; call resume() before the "
                "first mini-batch, or choose another folder, or remove them"
            )
        self._continues = True


def _first_other(saved: Mapping[str, Any], own: Mapping[str, Any]) -> str | None:
    """The first weight or buffer that only one of them has, or that has another shape in the other."""
    for name in (*saved, *own):
        shapes = [getattr(state.get(name), "shape", None) for state in (saved, own)]
        if name not in saved or name not in own or shapes[0] != shapes[1]:
            return name
    return None
