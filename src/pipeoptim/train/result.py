"""The result of a run: final figures and what each stage held, written to ``result.json`` by the run itself."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeoptim.files import read_object, reading
from pipeoptim.telemetry.metrics import Row, read_rows
from pipeoptim.telemetry.trace import MergedTrace
from pipeoptim.version import __version__


@dataclass(frozen=True)
class StageFacts:
    """One stage at the end of a run.

    Args:
        stage: k.
        parameters: how many weights it trains.
        gap: version gap s of its first micro-batch, in steady state.
        weight_copies: copies of its weights that the method promises to hold at most.
        weight_bytes: bytes of memory that held weights, measured in mid-flight.
        updates: its version t. skipped: how many of these left the weights as they were (see ``on_bad``).
        clipped: how many tensors AdaGC has scaled, in all updates together; None under other clipping.
        prediction_error: mean relative error of its last measured predictions (1: as good as none); None if not measured.
        prediction_scale: mean of the factors that these were made with. best_scale: of those that would have fitted best.
        idle: share of the traced time in which it neither computed nor communicated; None without a trace, and where all
            stages share a process. waiting: the part of it that waited for other stages. communication: share of messages.
        ideal_idle: idle share of the ideal schedule of the same actions; None without a trace.
    """

    stage: int
    parameters: int
    gap: int
    weight_copies: int
    weight_bytes: int
    updates: int
    skipped: int = 0
    clipped: int | None = None
    prediction_error: float | None = None
    prediction_scale: float | None = None
    best_scale: float | None = None
    idle: float | None = None
    waiting: float | None = None
    communication: float | None = None
    ideal_idle: float | None = None


@dataclass(frozen=True)
class RunResult:
    """A run that ended well.

    Args:
        run_dir: its directory.
        status: ``"finished"``, or ``"stopped"`` by a signal (saved, can be resumed).
        step: mini-batches done in all.
        train_loss: mean over the last 5 % of the run's mini-batches.
        val_loss, val_metrics: of the last validation; None and {} if there was none.
        samples_per_second: training only, without validations and checkpoints; None if this session did no mini-batch.
        seconds: of this session, validations and checkpoints included.
        stages: what each held.
        data: what it was trained on.
        versions: of pipeoptim, torch and Python.
        reason: why a callback ended the run before its last step; empty where none did.
        machine: hardware and versions of the process of the last stage; empty where an older version wrote the result.
        stopped_by: the name of the signal, such as ``"SIGTERM"``; empty for none.
    """

    run_dir: Path
    status: Literal["finished", "stopped"]
    step: int
    train_loss: float | None
    val_loss: float | None
    val_metrics: dict[str, float]
    samples_per_second: float | None
    seconds: float
    stages: tuple[StageFacts, ...]
    data: str
    versions: dict[str, str]
    machine: dict[str, Any] = field(default_factory=dict)
    stopped_by: str = ""
    reason: str = ""

    def rows(self) -> list[Row]:
        """All rows of ``metrics.jsonl``."""
        return read_rows(self.run_dir / "metrics.jsonl")

    def to_json(self) -> str:
        """One JSON object; without the directory, which may be moved."""
        data = asdict(self)
        del data["run_dir"]
        return json.dumps(data, indent=2, allow_nan=False) + "\n"

    @classmethod
    def read(cls, run_dir: Path) -> RunResult:
        """What the last session of the run in ``run_dir`` wrote.

        Raises:
            OSError: it wrote nothing.
        """
        with reading(run_dir):
            data = read_object(run_dir / "result.json")
            stages = tuple(StageFacts(**facts) for facts in data.pop("stages"))
            return cls(run_dir=run_dir, stages=stages, **data)


def traced_shares(trace: MergedTrace) -> dict[int, dict[str, float]]:
    """Stage -> the fields of its :class:`StageFacts` that come from the trace."""
    names = ("ideal_idle",) if trace.emulated else ("ideal_idle", "idle", "waiting", "communication")
    return {one.stage: {name: getattr(one, name) for name in names} for one in trace.shares}


def versions() -> dict[str, str]:
    """Of what computes."""
    import torch

    return {"pipeoptim": __version__, "torch": torch.__version__, "python": platform.python_version()}
