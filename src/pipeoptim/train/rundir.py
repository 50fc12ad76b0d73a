"""The directory of a run: what is where, how it begins, how it is taken up again. Nothing is ever overwritten silently."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeoptim.config import TrainConfig
from pipeoptim.errors import ConfigError

if TYPE_CHECKING:
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
    def tensorboard(self) -> Path:
        """Figures for TensorBoard, if they were asked for."""
        return self.path / "tensorboard"

    @property
    def trace(self) -> Path:
        """What each stage did and when, if that was asked for."""
        return self.path / "trace"

    @property
    def logs(self) -> Path:
        """What the processes of the stages print."""
        return self.path / "logs"

    def resume_command(self) -> str:
        """What to type to continue this run."""
        out = "" if self.path.parent == DEFAULT_OUT else f" --out {shlex.quote(str(self.path.parent))}"
        return f"{_program()} train --resume --name {shlex.quote(self.path.name)}{out}"

    def check_new(self) -> None:
        """Raises ConfigError if the directory exists."""
        if self.path.exists():
            raise ConfigError(
                f"run directory {self.path} exists; continue that run with --resume, or choose another name with --name"
            )

    def create(self, config: TrainConfig) -> None:
        """Make the directory and write the configuration.

        Raises:
            ConfigError: it exists, or cannot be made.
        """
        self.check_new()
        text = config.to_json()
        try:
            self.path.mkdir(parents=True)
        except FileExistsError:
            self.check_new()
            raise
        except OSError as error:
            raise ConfigError(
                f"run directory {self.path} cannot be made ({error.strerror}); choose another place with --out"
            ) from error
        self.config.write_text(text)

    def write_config(self, config: TrainConfig) -> None:
        """Replace the configuration of a run that is taken up with more steps, or on another engine."""
        temporary = self.config.with_name(self.config.name + ".tmp")
        temporary.write_text(config.to_json())
        temporary.replace(self.config)

    def read_config(self) -> TrainConfig:
        """The configuration of an existing run.

        Raises:
            ConfigError: there is no such run.
        """
        try:
            return TrainConfig.from_json(self.config.read_text())
        except OSError as error:
            raise ConfigError(
                f"no run to resume in {self.path} (no {self.config.name}); check --name and --out, or leave out --resume"
            ) from error

    def how_to_resume(self) -> str:
        """What is saved and what to type, as the end of a sentence about a failure."""
        from pipeoptim.checkpoint import find

        meta = find(self.checkpoints).meta
        if meta is None:
            return "no checkpoint was written yet: start again with another --name"
        return f"resume from step {meta.step} with: {self.resume_command()}"


@dataclass(frozen=True)
class Start:
    """Where a session begins: at step 0, or at a checkpoint."""

    step: int = 0
    checkpoint: Path | None = None


def newest(run: RunDir, config: TrainConfig, say: Callable[[str], None]) -> tuple[Path, Meta]:
    """The newest complete checkpoint of ``run``; torn ones are mentioned to ``say`` and passed over.

    Raises:
        ConfigError: there is none, or it is of another configuration.
    """
    from pipeoptim.checkpoint import find

    found = find(run.checkpoints)
    if found.folder is None or found.meta is None:
        reasons = "; ".join(f"{folder.name}: {reason}" for folder, reason in found.torn)
        what = f"no complete checkpoint in {run.checkpoints} ({reasons})" if reasons else f"no checkpoint in {run.checkpoints}"
        raise ConfigError(f"{what}; start a new run with another --name")
    if found.meta.config != config.fingerprint() or found.meta.stages != config.stages:
        raise ConfigError(
            f"checkpoint {found.folder} is of another configuration than {run.config}; "
            "restore that file, or start a new run with another --name"
        )
    for folder, reason in found.torn:
        say(f"checkpoint {folder} is torn ({reason}); resuming from {found.folder.name}")
    return found.folder, found.meta


def begin(run: RunDir, config: TrainConfig) -> Start:
    """A new run: make its directory."""
    run.create(config)
    return Start()


def resume(run: RunDir, config: TrainConfig, say: Callable[[str], None]) -> Start:
    """Take up ``run`` at its newest complete checkpoint; torn ones are mentioned to ``say`` and passed over.

    Raises:
        ConfigError: there is none, it is of another configuration, or the run is finished.
    """
    folder, meta = newest(run, config, say)
    if meta.step >= config.steps:
        raise ConfigError(f"run {run.path} is finished ({meta.step} of {config.steps} steps); {_what_else(config)}")
    if config != run.read_config():
        _check_longer(config, run.read_config())
        run.write_config(config)
    if config.trace:  # the new one may be of fewer stages
        shutil.rmtree(run.trace, ignore_errors=True)
    return Start(meta.step, folder)


def _what_else(config: TrainConfig) -> str:
    from pipeoptim.train.lr_schedules import depends_on_length

    if depends_on_length(config.lr_schedule):  # more steps would be another schedule from the beginning
        return "start a new run with another --name, with more --steps if it shall train longer"
    return "raise --steps to train it further"


def _program() -> str:
    """How this program is called where its name alone would not be found: hints are there to be pasted."""
    called = sys.argv[0]
    return shlex.quote(called) if Path(called).name == "pipeoptim" and shutil.which("pipeoptim") is None else "pipeoptim"


def _check_longer(config: TrainConfig, before: TrainConfig) -> None:
    from pipeoptim.train.lr_schedules import depends_on_length

    if config.steps != before.steps and depends_on_length(config.lr_schedule):
        raise ConfigError(
            f"steps is {config.steps}, but the run was begun with {before.steps} and the shape of its lr_schedule "
            f"{config.lr_schedule.target!r} depends on that; leave --steps out"
        )
