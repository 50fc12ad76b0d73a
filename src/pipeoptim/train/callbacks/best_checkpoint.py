"""Keeps the checkpoint of the best validation, however many newer ones come."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from pipeoptim.files import replace_folder, sync_tree
from pipeoptim.train.callbacks.callback import Callback, RunView
from pipeoptim.train.monitored import MonitoredFigure
from pipeoptim.train.rundir import RunDir


class BestCheckpoint(Callback):
    """Keeps it in ``runs/<name>/best``; ``--export`` writes its weights in place of the last ones.

    Only steps that validate and save count: let ``eval_every`` divide ``checkpoint_every``, or be equal to it.

    Args:
        monitor, mode: the best by which figure, see :class:`~pipeoptim.train.monitored.MonitoredFigure`.
    """

    def __init__(self, monitor: str = "val_loss", mode: str = "min") -> None:
        self._figure = MonitoredFigure(monitor, mode)
        self._waiting: dict[int, Mapping[str, float]] = {}  # step -> figures of a validation whose checkpoint may still come

    def on_start(self, run: RunView) -> None:
        """Find out how good the one is that an earlier session has kept, and the one that this session begins with."""
        from pipeoptim.checkpoint import folder_name, read_meta

        directory = RunDir(run.folder)
        if not run.reports:
            return
        kept = read_meta(directory.best).step if directory.best.exists() else None
        if kept is not None and kept > run.start:  # that step will be trained again
            shutil.rmtree(directory.best)
        known = {row["step"]: row for row in run.rows() if self._figure.name in row}
        if kept in known:
            self._figure.improves(known[kept])
        start = directory.checkpoints / folder_name(run.start)
        if run.start in known and start.exists():  # the earlier session may have ended before it was told of it
            self._keep_if_best(run, known[run.start], start)

    def on_eval(self, run: RunView, step: int, figures: Mapping[str, float]) -> None:
        """Wait for the checkpoint of the same step, which may be complete only after the next validation."""
        self._waiting[step] = dict(figures)

    def on_checkpoint(self, run: RunView, step: int, folder: Path) -> None:
        """Keep it if it is the best."""
        figures = self._waiting.get(step)
        self._waiting = {later: its for later, its in self._waiting.items() if later > step}
        if figures is not None:
            self._keep_if_best(run, figures, folder)

    def _keep_if_best(self, run: RunView, figures: Mapping[str, float], folder: Path) -> None:
        if not self._figure.improves(figures):
            return
        best = RunDir(run.folder).best
        part = best.with_name(f".{best.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(folder, part, copy_function=_link)
        sync_tree(part)
        replace_folder(part, best)


def _link(source: str, target: str) -> None:
    """The same file under another name, which takes no space; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


CALLBACK = BestCheckpoint
