"""Of processes that end together, the one that is named is the one that failed first."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from pipeoptim.train.launcher import _first_failure


def test_the_first_of_failures_is_named_and_not_who_only_met_nobody(tmp_path: Path) -> None:
    # Stage 1 was frozen; it woke up when stage 0 had ended, and found nobody to gather with.
    errors = {
        0: (7, "StageFailure: stage 1 gave no sign of life for 10 s"),
        1: (8, "StageFailure: the processes did not meet"),
    }
    failures = {}
    for k, (seconds, text) in errors.items():
        told = {"message": {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(seconds)}}}
        (tmp_path / f"{k}.json").write_text(json.dumps(told))
        failures[k] = ProcessFailure(k, 10 + k, 1, str(tmp_path / f"{k}.json"))
    logs: Any = SimpleNamespace(err=lambda k: f"stage-{k}.err", layout=SimpleNamespace(name=lambda k: f"stage {k}"))
    found = str(_first_failure(failures, logs))
    assert found == "stage 1 gave no sign of life for 10 s (seen by stage 0, log: stage-0.err)"
    failures[0] = ProcessFailure(0, 10, -signal.SIGTERM, str(tmp_path / "none.json"))  # ended by the agent
    assert str(_first_failure(failures, logs)).startswith("the processes did not meet (seen by stage 1")
