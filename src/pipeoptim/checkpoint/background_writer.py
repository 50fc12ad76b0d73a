"""Writing checkpoints in a thread, so that training goes on meanwhile::

    main thread    drain, copy the state to host memory | train ...                            | next checkpoint: how did the last one end?
    thread                                              | stage files, checksums, "written"    |
    first process                                       |   ... when all have said so: meta.json, rename, older ones removed

No collective runs in the thread, since those of training are on their way: the processes tell each other through a store.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from pipeoptim.checkpoint.manifest import digest, folder_name
from pipeoptim.checkpoint.stage_files import pack_stage, stage_file, write_packed
from pipeoptim.checkpoint.write_checkpoint import make_valid, prune, raise_cause, unfinished, unfinished_checkpoints
from pipeoptim.files import cause_of, make_folder

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

_LOOK = 0.01  # seconds between looks for what the others have written
_PATIENCE = 5.0  # seconds for a checkpoint under way, where training has failed


class WritingGroup(Protocol):
    """The processes that write together."""

    @property
    def index(self) -> int: ...
    @property
    def store(self) -> Store: ...
    def gather(self, value: Any) -> list[Any]: ...


@dataclass
class _Write:
    """A checkpoint on its way.

    Attributes:
        number: of all that were begun.
        processes: how many write it.
        own: stage -> its tensors and metadata.
        written: set when the files of this process are there, or could not be written.
        cause: why not, or why the first process could not complete it.
    """

    number: int
    step: int
    processes: int
    own: dict[int, tuple[dict[str, Tensor], dict[str, str]]]
    written: threading.Event = field(default_factory=threading.Event)
    cause: str | None = None
    error: Exception | None = None


class BackgroundWriter:
    """Writes the checkpoints of a run below ``root``. Every process of ``group`` makes one, and the same calls.

    Args:
        root: folder of the checkpoints.
        completed: called with step and folder by :meth:`finish`, and so by the next :meth:`begin`, once a checkpoint is complete.
        config: fingerprint of the configuration.
        keep: complete checkpoints to keep, the newest included; older ones are removed.
        versions: of what writes; information only.
        counts: whether the checkpoint of a step is one of those; others are neither counted nor removed.
    """

    def __init__(
        self,
        root: Path,
        group: WritingGroup,
        completed: Callable[[int, Path], None] = lambda _step, _folder: None,
        *,
        config: str,
        keep: int,
        versions: Mapping[str, str],
        counts: Callable[[int], bool] = lambda _step: True,
    ) -> None:
        self.completed = completed
        self.root, self.group, self.config, self.keep = root, group, config, keep
        self.versions, self.counts = dict(versions), counts
        self._begun = 0
        self._write: _Write | None = None
        self._thread: threading.Thread | None = None
        self._buffers: dict[tuple[int, str], Tensor] = {}

    def begin(self, step: int, states: Mapping[int, Mapping[str, Any]]) -> None:
        """Begin to write the checkpoint of ``step``, once the one before is complete; training may change ``states`` afterwards.

        Args:
            states: stage -> ``stage_state_dict(stage)``.

        Raises:
            CheckpointWriteError: in all processes, where this one cannot be begun or the one before could not be written.
        """
        self.finish()
        cause = None
        if self.group.index == 0:
            try:
                for rest in unfinished_checkpoints(self.root):  # of a run that was killed
                    shutil.rmtree(rest, ignore_errors=True)
                make_folder(unfinished(self.root, step))
            except OSError as error:
                cause = cause_of(error)
        answers = self.group.gather(cause)
        raise_cause(self._final(step), answers, None)
        packed = {k: pack_stage(state) for k, state in states.items()}
        own = {k: (self._copied(k, tensors), metadata) for k, (tensors, metadata) in packed.items()}
        self._begun += 1
        self._write = write = _Write(self._begun, step, len(answers), own)
        # A daemon: where another process has died, the first one's thread would wait for what it never writes.
        self._thread = threading.Thread(target=self._carry_out, args=(write,), name="pipeoptim-checkpoint", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait for the checkpoint that was begun. When this returns on any process, it is complete, and on the disk.

        Raises:
            CheckpointWriteError: in all processes, with the cause of the first that could not write.
        """
        write, thread = self._write, self._thread
        if write is None or thread is None:
            return
        self._write = self._thread = None
        write.written.wait()
        # All have told the store by then, so that the first one's thread ends; and where a process has died, this fails.
        self.group.gather(None)
        thread.join()
        raise_cause(self._final(write.step), self.group.gather(write.cause), write.error)
        self.completed(write.step, self._final(write.step))

    def leave(self) -> None:
        """After a failure of training: give the checkpoint that was begun a little time."""
        if self._thread is not None:
            self._thread.join(_PATIENCE)

    def _final(self, step: int) -> Path:
        return self.root / folder_name(step)

    def _copied(self, k: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # Into the memory of the last copy: fresh memory costs more than the copy, a page fault per 4 KiB (benchmarks/saving.py).
        found = {}
        for name, tensor in tensors.items():
            buffer = self._buffers.get((k, name))
            if buffer is None or (buffer.shape, buffer.stride(), buffer.dtype) != (tensor.shape, tensor.stride(), tensor.dtype):
                buffer = tensor.detach().to("cpu", copy=True)
            else:
                buffer.copy_(tensor.detach())
            self._buffers[k, name] = found[name] = buffer
        return found

    # -- in the thread ---------------------------------------------------------------------------------------------------

    def _carry_out(self, write: _Write) -> None:
        folder = unfinished(self.root, write.step)
        files: dict[str, tuple[int, str]] = {}
        try:
            for k, (tensors, metadata) in write.own.items():
                write_packed(folder / stage_file(k), tensors, metadata)
                files[stage_file(k)] = digest(folder / stage_file(k))
        except Exception as error:
            self._note(write, error)
        store = self.group.store
        store.set(f"{write.number}/{self.group.index}", json.dumps([files, write.cause]))
        write.written.set()
        if self.group.index == 0:
            try:
                self._complete(write, self._everyone(write))
            except Exception as error:
                self._note(write, error)

    def _note(self, write: _Write, error: Exception) -> None:
        write.error = error
        write.cause = write.cause or (cause_of(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}")

    def _everyone(self, write: _Write) -> list[tuple[dict[str, tuple[int, str]], str | None]]:
        """What all processes have said, when the last has."""
        store, keys = self.group.store, [f"{write.number}/{j}" for j in range(write.processes)]
        while not store.check(keys):  # rather than wait(), which would keep others from the store
            time.sleep(_LOOK)
        found = [json.loads(store.get(key)) for key in keys]
        for key in keys:
            store.delete_key(key)
        return found

    def _complete(self, write: _Write, everyone: list[tuple[dict[str, tuple[int, str]], str | None]]) -> None:
        if any(cause for _, cause in everyone):
            return
        files = {name: (size, sums) for part, _ in everyone for name, (size, sums) in part.items()}
        make_valid(self.root, write.step, files, self.config, self.versions)
        prune(self.root, write.step, self.keep, self.counts)
