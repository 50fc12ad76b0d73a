"""The trained weights of a run as a model: at its end (``--export``), or later, from its checkpoint (``pipeoptim export``)."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from pipeoptim.checkpoint import load_stage, read_meta, save_weights
from pipeoptim.engine.pipeline import Pipeline
from pipeoptim.train.engines import make_emulator
from pipeoptim.train.lock import locked
from pipeoptim.train.rundir import RunDir, newest
from pipeoptim.train.setup import RunSetup, build_setup, cpu_threads
from pipeoptim.train.trust import check_trusted


def write_export(run: RunDir, setup: RunSetup, pipe: Pipeline, folder: Path, overwrite: bool = True) -> None:
    """Write the best weights that ``run`` has kept, or else those in ``pipe``; the last that is done with the stages, which this may
    change."""
    pipe.drain()
    if run.best.exists():
        for k in pipe.local_stages:
            pipe.load_stage_state_dict(k, load_stage(run.best, k))
    if setup.stagewise is not None:
        setup.stagewise.prepare_export(pipe.stage_module(k) for k in pipe.local_stages)
    save_weights(pipe, folder, also_save=getattr(setup.task, "also_save", ()), overwrite=overwrite)


def export_run(path: Path, folder: Path | None = None) -> tuple[Path, int]:
    """Write the weights of the newest checkpoint of the run in ``path``, or of its best one; all stages are in this process.

    Args:
        folder: must not exist; by default ``model`` in the run, where an earlier export is replaced.

    Returns:
        Where they are, and after how many mini-batches.

    Raises:
        ConfigError: there is no run or no checkpoint, it is being trained, it names functions that nobody has named here, or the folder
            exists.
    """
    run = RunDir(path)
    config = run.read_config()
    check_trusted(path, config)
    with locked(path), cpu_threads(config.threads):
        # What listens to a run does not hear of this.
        setup = build_setup(replace(config, callbacks="", loggers="")).all_here()
        found, meta = newest(run, config, lambda note: print(note, file=sys.stderr), setup.stages)
        pipe, _ = make_emulator(setup, setup.task.loss)
        for k in pipe.local_stages:
            pipe.load_stage_state_dict(k, load_stage(found, k))
        write_export(run, setup, pipe, folder or run.exported, overwrite=folder is None)
    return folder or run.exported, (read_meta(run.best) if run.best.exists() else meta).step
