"""Resuming with another number of stages: a run's newest checkpoint is cut anew, as the beginning of a run of its own.

The model is built twice in this process, as it was cut and as it will be, and the state goes through a sharded checkpoint
(:mod:`pipeoptim.checkpoint.sharded`). Weights, optimizer states, options of param groups, schedules and versions are the same
afterwards; the stages' random numbers (dropout) and what clipping and compression remember begin anew, since they belonged to other
stages.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from pipeoptim.checkpoint import load_sharded, load_stage, save, save_sharded
from pipeoptim.config import TrainConfig
from pipeoptim.engine.stage.origin import find_origins
from pipeoptim.engine.stage.tied import Tied
from pipeoptim.errors import ConfigError
from pipeoptim.train.checks import check
from pipeoptim.train.engines import make_emulator
from pipeoptim.train.group import SingleProcessGroup
from pipeoptim.train.layout import layout_of
from pipeoptim.train.result import versions
from pipeoptim.train.rundir import RunDir, newest
from pipeoptim.train.setup import build_setup, cpu_threads, probe_setup
from pipeoptim.train.trust import COMPONENTS
from pipeoptim.train.worker import under_torchrun


def recut(run: RunDir, config: TrainConfig) -> RunDir:
    """See :func:`pipeoptim.train.recut`."""
    check(config)
    if under_torchrun():
        raise ConfigError("a run cannot be cut anew under torchrun; do so without it, Ctrl-C, then resume under it")
    before = run.read_config()
    if before.rate_by_gap or config.rate_by_gap:
        raise ConfigError(
            f"rate_by_gap is {before.rate_by_gap or config.rate_by_gap}: the learning rates of {run.path} belong to its {before.stages} "
            "stages, so that it cannot be cut anew; leave --stages and --cut out"
        )
    for what in (*COMPONENTS, "method"):  # what the file names is called below: only what the caller has named
        found, given = getattr(before, what), getattr(config, what)
        if found != given:
            shown = [getattr(value, "target", value) for value in (found, given)]
            raise ConfigError(
                f"{run.config} has {what} {shown[0]!r}, not {shown[1]!r}; a run can be cut anew with other stages, cut, chunks and "
                "replicas only"
            )
    folder, meta = newest(run, before, _print_note, _stage_modules(before))
    new = RunDir(run.path.with_name(f"{run.path.name}-{_layout_label(config)}"))
    new.check_new()
    states = _moved_states(folder, before, config)
    # Only now: whatever refuses the new cut has refused it before anything was written.
    new.create(config)
    save(
        new.checkpoints,
        meta.step,
        states,
        config=config.fingerprint(),
        group=SingleProcessGroup(),
        keep=config.keep_checkpoints,
        versions=versions(),
    )
    if run.metrics.exists():
        shutil.copyfile(run.metrics, new.metrics)  # rows after the checkpoint go when the run is resumed
    _print_note(
        f"run {run.path} had {layout_of(before).describe()}; it goes on from step {meta.step} with {layout_of(config).describe()} in "
        f"{new.path}: the same weights, optimizer states and learning rates, new random numbers"
    )
    return new


def _layout_label(config: TrainConfig) -> str:
    words = [f"{config.stages}-stages"]
    words += [f"cut-{config.cut.replace(',', '-')}"] if config.cut else []
    words += [f"{config.chunks}-chunks"] if config.chunks > 1 else []
    words += [f"{config.replicas}-replicas"] if config.replicas > 1 else []
    return "-".join(words)


def _moved_states(checkpoint: Path, before: TrainConfig, after: TrainConfig) -> dict[int, dict[str, Any]]:
    """The states of the stages of ``after``, from the checkpoint of those of ``before``."""
    with cpu_threads(after.threads), TemporaryDirectory() as folder:
        (old, old_tied), (new, new_tied) = _pipe(before), _pipe(after)
        for k in old.local_stages:
            old.load_stage_state_dict(k, load_stage(checkpoint, k))
        save_sharded(old, Path(folder) / "moved", _numbered_names(old, old_tied))
        load_sharded(new, Path(folder) / "moved", _numbered_names(new, new_tied))
        return {k: new.stage_state_dict(k) for k in new.local_stages}


def _pipe(config: TrainConfig) -> tuple[Any, Sequence[Tied]]:
    setup = build_setup(config).all_here()
    probe_setup(setup)
    return make_emulator(setup, setup.task.loss)[0], setup.tied


def _stage_modules(config: TrainConfig) -> Sequence[nn.Module]:
    with cpu_threads(config.threads):
        return build_setup(config).stages


def _numbered_names(pipe: Any, tied: Sequence[Tied]) -> list[dict[str, str]] | None:
    """Names that no cut changes: the tensors of a model have the same order in whatever contiguous pieces, and the copies of a tied weight
    have the number of the first. None for stages that carry their names in the model."""
    if any(origin.names for k in pipe.local_stages for _, _, origin in find_origins(pipe.stage_module(k))):
        return None
    numbers: dict[tuple[int, str], str] = {}
    for k in pipe.local_stages:
        for own in pipe.stage_module(k).state_dict():
            numbers[k, own] = f"tensor {len(numbers)}"
    for tie in tied:
        first, *others = tie.places
        for place in others:
            numbers[place] = numbers[first]
    return [{number: own for (j, own), number in numbers.items() if j == k} for k in pipe.local_stages]


def _print_note(text: str) -> None:
    print(text, file=sys.stderr)
