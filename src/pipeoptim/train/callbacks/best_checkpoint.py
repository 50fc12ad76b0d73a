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
        self._figure, self._validated = MonitoredFigure(monitor, mode), (-1, dict[str, float]())

    def on_start(self, run: RunView) -> None:
        """Find out how good the one is that an earlier session has kept."""
        from pipeoptim.checkpoint import read_meta

        best = RunDir(run.folder).best
        if not run.reports or not best.exists():
            return
        kept = read_meta(best).step
        if kept > run.start:  # that step will be trained again
            shutil.rmtree(best)
        for row in run.rows():
            if row.get("step") == kept and self._figure.name in row:
                self._figure.improves(row)

    def on_eval(self, run: RunView, step: int, figures: Mapping[str, float]) -> None:
        """Wait for the checkpoint of the same step."""
        self._validated = (step, dict(figures))

    def on_checkpoint(self, run: RunView, step: int, folder: Path) -> None:
        """Keep it if it is the best."""
        validated, figures = self._validated
        if validated != step or not self._figure.improves(figures):
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
