"""The options of a pipeline that a training run has.

Written by ``python -m pipeoptim.options.generate`` from ``table.py``: change that, and run it again.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeoptim.options.runs import run_setting


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Fields that every :class:`~pipeoptim.config.TrainConfig` has."""

    prediction: str = run_setting("prediction")
    refresh: int = run_setting("refresh")
    scale: str = run_setting("scale")
    synchronous_updates: int = run_setting("synchronous_updates")
    clip: float = run_setting("clip")
    clip_scope: str = run_setting("clip_scope")
    autocast: str = run_setting("autocast")
    monitor_every: int = run_setting("monitor_every")
    uneven: bool = run_setting("uneven")
    recompute: str = run_setting("recompute")
    overlap: bool = run_setting("overlap")
    slack: str = run_setting("slack")
    compress: str = run_setting("compress")
    error_feedback: str = run_setting("error_feedback")
    trace: bool = run_setting("trace")
    trace_steps: int = run_setting("trace_steps")
    on_bad: str = run_setting("on_bad")
    outlier: float = run_setting("outlier")
    audit: int = run_setting("audit")
    checksums: bool = run_setting("checksums")
