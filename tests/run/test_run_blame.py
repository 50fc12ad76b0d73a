"""Of processes that end together, the one that is named is the one that failed first."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from pipeoptim.errors import StageFailure
from pipeoptim.train.group import DistributedGroup
from pipeoptim.train.launcher import _first_failure


def test_a_process_that_waits_for_one_that_is_gone_blames_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def closed(*_: Any, **__: Any) -> None:
        raise RuntimeError("Connection closed by peer [127.0.0.1]:39647.")

    monkeypatch.setattr(dist, "barrier", closed)
    monkeypatch.setattr("pipeoptim.engine.processes.collectives.all_gather_plain", closed)
    group = DistributedGroup(SimpleNamespace(reporter=0))  # type: ignore[arg-type]
    for call in (group.barrier, lambda: group.gather(1)):
        with pytest.raises(StageFailure, match=r"another process of the run died, or does not answer \(Connection closed"):
            call()

    # Stage 1 was frozen; it woke up when stage 0 had ended, and found nobody to gather with.
    errors = {
        0: (7, "StageFailure: stage 1 gave no sign of life for 10 s"),
        1: (8, "StageFailure: another process of the run died"),
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
    assert str(_first_failure(failures, logs)).startswith("another process of the run died (seen by stage 1")
