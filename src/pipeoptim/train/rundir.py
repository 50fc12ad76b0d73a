"""The directory of a run: its files, how a run begins in it, and how it is resumed. Nothing is overwritten silently."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeoptim.config import NOT_COMPUTED, Component, TrainConfig
from pipeoptim.errors import ConfigError
from pipeoptim.files import cause_of, make_folder, read_text, sync_folder, write_durably
from pipeoptim.telemetry.metrics import check_rows_file
from pipeoptim.train import trust

if TYPE_CHECKING:
    from torch import nn

    from pipeoptim.checkpoint import Meta

DEFAULT_OUT = Path("runs")


@dataclass(frozen=True)
class RunDir:
    """Paths of the run in ``path``."""

    path: Path

    @property
    def config(self) -> Path:
        """The configuration, as JSON."""
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        """One row per mini-batch and per validation."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def curve(self) -> Path:
        """Picture of the losses."""
        return self.path / "loss.png"

    @property
    def result(self) -> Path:
        """Figures of the last session that ended well."""
        return self.path / "result.json"

    @property
    def best(self) -> Path:
        """The checkpoint of the best validation, if it was asked for."""
        return self.path / "best"

    @property
    def exported(self) -> Path:
        """The trained weights, if they were asked for."""
        return self.path / "model"

    @property
    def trace(self) -> Path:
        """What each stage did and when, if that was asked for."""
        return self.path / "trace"

    @property
    def logs(self) -> Path:
        """What the processes of the stages print."""
        return self.path / "logs"

    @property
    def bad(self) -> Path:
        """Folder of the mini-batches that are left out: a file for each, with its number and the reason."""
        return self.path / "bad"

    def leave_out(self, n: int, reason: str) -> None:
        """Note that mini-batch ``n`` is bad. Several processes may do so at once."""
        self.bad.mkdir(exist_ok=True)
        (self.bad / f"mini-batch-{n}.txt").write_text(reason + "\n", encoding="utf-8")

    def left_out(self) -> dict[int, str]:
        """The mini-batches that are bad, with the reasons."""
        files = sorted(self.bad.glob("mini-batch-*.txt"))
        numbers = {file: file.stem.removeprefix("mini-batch-") for file in files}
        return {int(number): file.read_text(encoding="utf-8").strip() for file, number in numbers.items() if number.isdecimal()}

    def resume_command(self) -> str:
        """What to type to continue this run."""
        out = "" if self.path.parent == DEFAULT_OUT else f" --out {shlex.quote(str(self.path.parent))}"
        return f"{_program_name()} train --resume --name {shlex.quote(self.path.name)}{out}"

    def check_new(self) -> None:
        """Raises ConfigError if the directory exists."""
        if self.path.exists():
            raise ConfigError(
                f"run directory {self.path} exists; continue that run with --resume, or start another one with --new or --name"
            )

    def beside(self) -> RunDir:
        """The first of ``<name>-2``, ``<name>-3``, ... that does not exist; this one if it does not."""
        found, n = self, 1
        while found.path.exists():
            n += 1
            found = RunDir(self.path.with_name(f"{self.path.name}-{n}"))
        return found

    def create(self, config: TrainConfig) -> None:
        """Make the directory and write the configuration.

        Raises:
            ConfigError: it exists, or cannot be made.
        """
        self.check_new()
        text = config.to_json()
        part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        try:
            shutil.rmtree(part, ignore_errors=True)
            make_folder(part)
            write_durably(part / self.config.name, text)
            trust.sign(part, config)
            part.rename(
                self.path
            )  # whole or not at all: a directory without its configuration could be neither resumed nor begun
            sync_folder(self.path.parent)
        except OSError as error:
            shutil.rmtree(part, ignore_errors=True)
            self.check_new()
            raise ConfigError(
                f"run directory {self.path} cannot be made ({cause_of(error)}); choose another place with --out"
            ) from error

    def write_config(self, config: TrainConfig) -> None:
        """Replace the configuration of a run that is resumed with more steps, or on another engine; what it names has been checked."""
        write_durably(self.config, config.to_json())
        trust.sign(self.path, config)

    def read_config(self) -> TrainConfig:
        """The configuration of an existing run. Nothing that it names has been imported yet (see :mod:`.trust`).

        Raises:
            ConfigError: there is no such run, or its configuration cannot be read.
        """
        try:
            return TrainConfig.from_json(read_text(self.config))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ConfigError(
                f"there is no run in {self.path} (no {self.config.name}); check its name and the folder of the runs"
            ) from error
        except OSError as error:
            raise ConfigError(
                f"the configuration of run {self.path} cannot be read ({cause_of(error)}); make it readable"
            ) from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{self.config} is not UTF-8 text; restore it, or start a new run with another --name") from error
        except ConfigError as error:
            raise ConfigError(f"{self.config}: {error}") from error

    def config_digest(self) -> str:
        """SHA-256 of the file of the configuration."""
        return hashlib.sha256(self.config.read_bytes()).hexdigest()

    def finished_at(self) -> int | None:
        """The step at which the run says it has finished; None where it does not, or not in readable words."""
        result = self._read_result()
        try:
            return int(result["step"]) if result["status"] == "finished" else None
        except (ValueError, TypeError, KeyError):
            return None

    def why_ended(self) -> str:
        """Why a callback ended the run before its last step; empty where none did."""
        return str(self._read_result().get("reason") or "")

    def _read_result(self) -> dict[str, Any]:
        try:
            result = json.loads(read_text(self.result))
        except (OSError, ValueError, RecursionError):
            return {}
        return result if isinstance(result, dict) else {}

    def how_to_resume(self) -> str:
        """What is saved and what to type, as the end of a sentence about a failure."""
        from pipeoptim.checkpoint import find

        meta = find(self.checkpoints).meta
        if meta is None:
            return "no checkpoint was written yet: the same command begins again"
        return f"resume from step {meta.step} with: {self.resume_command()}"


class FinishedError(ConfigError):
    """There is nothing left to train."""


@dataclass(frozen=True)
class Start:
    """Where a session begins: at step 0, or at a checkpoint."""

    step: int = 0
    checkpoint: Path | None = None


def newest(run: RunDir, config: TrainConfig, say: Callable[[str], None], stages: Sequence[nn.Module] = ()) -> tuple[Path, Meta]:
    """The newest checkpoint of ``run`` to resume from; torn ones, and those whose weights are not finite, are mentioned to ``say`` and
    passed over.

    Args:
        stages: modules of the run's stages, for the names of their parameters.

    Raises:
        ConfigError: there is none, or it is of another configuration.
    """
    from pipeoptim.checkpoint import find, load_stage, sick_entry

    def sickness(folder: Path, meta: Meta) -> str | None:
        for k, module in enumerate(stages if len(stages) == meta.stages else ()):
            name = sick_entry(load_stage(folder, k), module)
            if name is not None:
                return f"stage {k}: {name!r}"
        return None

    found = find(run.checkpoints, sickness)
    if found.folder is None or found.meta is None:
        passed = [*found.torn, *((folder, f"weights that are not finite, {what}") for folder, what in found.sick)]
        reasons = "; ".join(f"{folder.name}: {reason}" for folder, reason in passed)
        if not reasons:
            raise ConfigError(
                f"no checkpoint in {run.checkpoints}; give the command that began this run again, without --resume: it starts at step 0"
            )
        raise ConfigError(f"no complete checkpoint in {run.checkpoints} ({reasons}); start a new run with another --name")
    if found.meta.config != config.fingerprint() or found.meta.stages != config.stages:
        raise ConfigError(
            f"checkpoint {found.folder} is of another configuration than {run.config}; "
            "restore that file, or start a new run with another --name"
        )
    for folder, reason in found.torn:
        say(f"checkpoint {folder} is torn ({reason}); resuming from {found.folder.name}")
    for folder, reason in found.sick:
        say(f"checkpoint {folder} has weights that are not finite ({reason}); resuming from {found.folder.name}")
    return found.folder, found.meta


def begin(run: RunDir, config: TrainConfig) -> Start:
    """A new run: make its directory."""
    run.create(config)
    return Start()


def resume(
    run: RunDir, config: TrainConfig, say: Callable[[str], None], stages: Sequence[nn.Module] = (), anew: bool = False
) -> Start:
    """Resume ``run`` at its newest checkpoint; see :func:`newest`. A run that ended behind its last checkpoint and before its result
    was written starts there with no step left: it is finished then.

    Args:
        anew: begin at step 0 where no checkpoint has been written yet.

    Raises:
        FinishedError: the run is finished.
        ConfigError: there is no checkpoint, or it is of another configuration; or the rows of the run are in no file.
    """
    check_rows_file(run.metrics)
    if anew and not any(run.checkpoints.glob("step-*")):
        if run.finished_at() == config.steps:
            raise _finished_error(run, config, config.steps)
        say(f"run {run.path} has no checkpoint yet; it begins again at step 0")
        start = Start()
    else:
        folder, meta = newest(run, config, say, stages)
        if meta.step >= config.steps and run.finished_at() == meta.step:
            raise _finished_error(run, config, meta.step)
        if anew and run.finished_at() == meta.step and run.why_ended():
            raise FinishedError(f"run {run.path} ended ({run.why_ended()}); to train it further: {run.resume_command()}")
        start = Start(meta.step, folder)
        if anew:
            say(f"run {run.path} exists; it continues from step {meta.step} of {config.steps}")
    if config != run.read_config():
        check_longer(config, run.read_config())
        run.write_config(config)
    run.result.unlink(missing_ok=True)  # from here on the run is neither finished nor stopped
    if config.trace and start.step < config.steps:  # the new one may be of fewer stages
        shutil.rmtree(run.trace, ignore_errors=True)
    return start


def _finished_error(run: RunDir, config: TrainConfig, step: int) -> FinishedError:
    return FinishedError(f"run {run.path} is finished ({step} of {config.steps} steps); {_what_else(config)}")


def same_run(run: RunDir, config: TrainConfig) -> TrainConfig:
    """``config``, as the command that began ``run`` gives it again; with its steps, where they were counted from epochs.

    Raises:
        ConfigError: the run was begun with other settings; the message names the first one.
    """
    if not run.config.exists():
        run.check_new()
    before = run.read_config()
    config = replace(config, epochs=0, steps=config.steps or before.steps)
    for f in fields(config) if config.fingerprint() != before.fingerprint() else ():
        old, new = getattr(before, f.name), getattr(config, f.name)
        if old != new and f.name not in NOT_COMPUTED:
            raise ConfigError(
                f"run directory {run.path} exists and was begun with {f.name} {_shown(old)}, not {_shown(new)}; start another run with "
                "--new or --name, or continue that one with --resume"
            )
    return config


def _shown(value: object) -> str:
    return f"{value.target} {value.options}" if isinstance(value, Component) else repr(value)


def _what_else(config: TrainConfig) -> str:
    from pipeoptim.train.lr_schedules import depends_on_length

    if depends_on_length(config.lr_schedule):  # more steps would be another schedule from the beginning
        return "start a new run with --new or another --name, with more --steps if it shall train longer"
    return "raise --steps to train it further"


def _program_name() -> str:
    """How this program is called where its name alone would not be found: hints are there to be pasted."""
    called = sys.argv[0]
    return shlex.quote(called) if Path(called).name == "pipeoptim" and shutil.which("pipeoptim") is None else "pipeoptim"


def check_longer(config: TrainConfig, before: TrainConfig) -> None:
    """Check that a run that was begun as ``before`` says may end where ``config`` says.

    Raises:
        ConfigError: its learning rates depend on the number of its steps, so it would have been another run from the beginning.
    """
    from pipeoptim.train.lr_schedules import depends_on_length

    if config.steps != before.steps and depends_on_length(config.lr_schedule):
        raise ConfigError(
            f"steps is {config.steps}, but the run was begun with {before.steps} and the shape of its lr_schedule "
            f"{config.lr_schedule.target!r} depends on that; leave --steps out"
        )
