"""Running a training run: ``pipeoptim.train.run(config, run_dir)``, on either engine.

Imports torch when it is called, not before: the command line must answer ``--help`` at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeoptim.train.node import Node

if TYPE_CHECKING:
    from pipeoptim.config import TrainConfig
    from pipeoptim.train.callbacks import Callback
    from pipeoptim.train.result import RunResult
    from pipeoptim.train.rundir import RunDir

__all__ = ["Node", "recut", "run"]


def run(
    config: TrainConfig,
    run_dir: Path | str,
    resume: bool | None = False,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
    node: Node | None = None,
) -> RunResult:
    """Train as ``config`` says and leave everything in ``run_dir``.

    Args:
        config: the complete configuration; with ``engine="emulator"`` the run stays in this process.
        run_dir: must not exist, unless ``resume``: ``config.json``, ``metrics.jsonl``, ``checkpoints/``, ``loss.png``,
            ``result.json``, and ``logs/`` of the processes.
        resume: continue from the newest complete checkpoint, bit for bit as a run that never stopped. ``config`` must be the
            run's own; only engine, steps and how often it validates may differ. None: whatever is to be done; a run that does
            not exist begins, another one is continued, from its beginning where it has no checkpoint yet.
        progress: show a progress bar (a terminal) or lines (elsewhere) on stdout.
        callbacks: objects that are called at the run's events, after those that ``config.callbacks`` names; see
            :class:`~pipeoptim.train.callbacks.Callback`. With ``engine="emulator"`` only: other processes make their own by name.
        node: this machine, where several carry out the run together, with ``survive`` and a ``run_dir`` that all of them share; see
            :class:`~pipeoptim.train.node.Node`. Every machine makes this call, with its own node.

    Raises:
        ConfigError: the run is impossible, finished, or in use by another process; nothing was written.
        StageFailure: a process failed; the message names its stage and how to resume.
        PipeOptimError: the loss or a weight became NaN or infinite, or the run was aborted. Weights that are not finite are never
            saved, and checkpoints that hold such weights are passed over with a warning.

    Example:
        >>> from pipeoptim.config import Component, TrainConfig
        >>> config = TrainConfig(
        ...     "example",
        ...     model=Component("pipeoptim_zoo.models.digits_cnn:digits_cnn", {"width": 4}),
        ...     data=Component("pipeoptim_zoo.data.digits:digits"),
        ...     optimizer=Component("adam", {"lr": 0.01}),
        ...     stages=2,
        ...     steps=3,
        ... )
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result = run(config, folder + "/example", progress=False)
        >>> result.status, result.step, [stage.updates for stage in result.stages]
        ('finished', 3, [3, 3])
    """
    from pipeoptim.train import api

    return api.run(config, run_dir, resume=resume, progress=progress, callbacks=callbacks, node=node)


def recut(run_dir: RunDir, config: TrainConfig) -> RunDir:
    """The newest checkpoint of a run, cut as ``config`` says, as the beginning of a run of its own, to be resumed.

    Args:
        run_dir: of the run; it stays as it is.
        config: its configuration but for stages, chunks and replicas.

    Returns:
        The new run's directory, ``<name>-<stages>-stages``, beside the other.

    Raises:
        ConfigError: there is no checkpoint, the new directory exists, or the model or the state of its optimizers cannot be cut so.
    """
    from pipeoptim.train import recutting

    return recutting.recut(run_dir, config)
