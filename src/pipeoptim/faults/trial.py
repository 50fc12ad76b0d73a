"""The run in which failures happen, beside one in which nothing does; both as processes of their own, as a user would start them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeoptim.config import TrainConfig
from pipeoptim.errors import PipeOptimError
from pipeoptim.faults.promise import Promise, check_possible, promise, step_of
from pipeoptim.faults.records import FaultRecords
from pipeoptim.faults.same_end import end_of, same
from pipeoptim.faults.sentences import Fault
from pipeoptim.telemetry.metrics import read_rows
from pipeoptim.train.config_file import to_toml
from pipeoptim.train.parent import end_with_parent
from pipeoptim.train.signals import AbortedError, StopSignals

_LOOK = 0.05  # seconds between looks
_TELL = 10.0  # seconds between two words on how far a run is
_INJECT = "pipeoptim.faults.inject:Inject"


@dataclass(frozen=True)
class FaultRow:
    """What came of one failure.

    Attributes:
        fault: the sentence.
        promised: how the run's configuration says that it ends.
        fired: whether it happened.
        survived: whether the run went on.
        bit_equal: whether the run ended with the bits of one in which nothing happened.
        seconds: from the failure until a mini-batch was begun that had not been begun before; None where there was none left.
        repeated: mini-batches that were trained again for it.
    """

    fault: str
    promised: Promise
    fired: bool
    survived: bool
    bit_equal: bool
    seconds: float | None
    repeated: int | None

    @property
    def kept(self) -> bool:
        """Whether what was promised came true; a failure that never happened proves nothing."""
        return (
            self.fired
            and self.survived >= (self.promised is not Promise.NOTHING)
            and (self.bit_equal or self.promised is not Promise.SAME_BITS)
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "promised": self.promised.value, "kept": self.kept}


def try_faults(config: TrainConfig, faults: Sequence[Fault], folder: Path, say: Callable[[str], None]) -> list[FaultRow]:
    """Train ``config`` in ``folder/undisturbed`` and again, with ``faults``, in ``folder/disturbed``.

    Args:
        say: is told how far it is.

    Raises:
        ConfigError: a failure cannot happen in this run.
        PipeOptimError: the undisturbed run failed.
        AbortedError: a signal came; it has ended the run.
    """
    check_possible(config, faults)
    folder.mkdir(parents=True)
    records = FaultRecords.beside(folder / "disturbed")
    last = config.stages - 1
    stages = [fault.stage if fault.stage is not None else last if fault.kind == "nan" else 0 for fault in faults]
    records.plan([(fault, stage, step_of(config, fault)) for fault, stage in zip(faults, stages, strict=True)])
    train_undisturbed(config, folder, say)
    callbacks = ",".join(filter(None, [config.callbacks, _INJECT]))
    finished = _train(replace(config, callbacks=callbacks), folder / "disturbed", records, faults, say) == 0
    equal = finished and same(end_of(folder / "undisturbed"), end_of(folder / "disturbed"))
    promises = [promise(config, fault) for fault in faults]
    if any(one is not Promise.SAME_BITS for one in promises):  # what changes the bits changes them for all
        promises = [Promise.GOES_ON if one is Promise.SAME_BITS else one for one in promises]
    rows = [_row(fault, promises[index], records, index, finished, equal) for index, fault in enumerate(faults)]
    (folder / "faults.json").write_text(json.dumps([row.to_dict() for row in rows], indent=1) + "\n")
    return rows


def train_undisturbed(config: TrainConfig, folder: Path, say: Callable[[str], None]) -> None:
    """Train ``config`` in ``folder/undisturbed``.

    Raises:
        PipeOptimError: it failed.
        AbortedError: a signal came; it has ended the run.
    """
    run = folder / "undisturbed"
    code = _train(config, run, FaultRecords.beside(run), [], say)
    if code:
        raise PipeOptimError(f"the undisturbed run ended with exit code {code}; see above")


def _train(
    config: TrainConfig, folder: Path, records: FaultRecords, faults: Sequence[Fault], say: Callable[[str], None]
) -> int:
    """Train in ``folder``. Returns the exit code. Whatever ends this process ends the run as well."""
    settings = folder.with_name(f"{folder.name}.toml")
    settings.write_text(to_toml(config))
    command = [sys.executable, "-m", "pipeoptim", "train", "--quiet", "--config", str(settings)]
    command += ["--out", str(folder.parent), "--name", folder.name]
    with StopSignals((signal.SIGTERM,), grace=0) as stop:
        stop.leave_to_others()  # the run has a grace time of its own
        run = subprocess.Popen(command, preexec_fn=end_with_parent)
        return _watch(run, folder, records, faults, stop, say)


def _watch(
    run: subprocess.Popen[bytes],
    folder: Path,
    records: FaultRecords,
    faults: Sequence[Fault],
    stop: StopSignals,
    say: Callable[[str], None],
) -> int:
    """Say what happens until the run in ``folder`` ends, and continue what was frozen. Returns its exit code."""
    waiting, frozen = dict(enumerate(faults)), dict[int, float]()
    told, looked = "", time.monotonic()
    say(f"{folder.name} run, in {folder}")
    try:
        while run.poll() is None:
            for index, fault in [*waiting.items()]:
                if (fired := records.fired(index)) is not None:
                    say(f"now: {fault}")
                    del waiting[index]
                    if fault.kind == "freeze":
                        frozen[fired.process] = fired.at + fault.seconds
            for process in [process for process, until in frozen.items() if time.time() >= until]:
                del frozen[process]
                _continue(process)
            if time.monotonic() > looked + _TELL:
                looked, before, told = time.monotonic(), told, _steps_done(folder)
                if told != before:
                    say(f"{folder.name} run: {told}")
            if stop.wait(_LOOK):
                raise AbortedError(f"{stop.name} came; what there is of the runs is in {folder.parent}", stop.number)
    except BaseException:
        for process in frozen:  # one that stands still hears no signal
            _continue(process)
        run.terminate()
        run.wait()
        raise
    return run.wait()


def _continue(process: int) -> None:
    with suppress(ProcessLookupError):  # it was taken for dead
        os.kill(process, signal.SIGCONT)


def _steps_done(run: Path) -> str:
    path = run / "metrics.jsonl"
    steps = [row["step"] for row in read_rows(path)] if path.exists() else []
    return f"step {max(steps)}" if steps else "starting"


def _row(fault: Fault, promised: Promise, records: FaultRecords, index: int, finished: bool, equal: bool) -> FaultRow:
    fired, recovered = records.fired(index), records.recovered(index)
    return FaultRow(
        str(fault),
        promised,
        fired is not None,
        fired is not None and (finished or recovered is not None),
        fired is not None and equal,
        recovered.at - fired.at if fired and recovered else None,
        recovered.repeated if recovered else None,
    )
