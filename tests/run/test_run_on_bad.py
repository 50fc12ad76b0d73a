"""``pipeoptim train --on-bad``: a mini-batch that is left out is in the metrics and in the result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import tiny
from pipeoptim.config import Component
from pipeoptim.errors import ConfigError, PipeOptimError
from pipeoptim.train import run

SPOILED = replace(tiny.recipe(), model=Component("tiny:spoiled_model"))


def test_a_mini_batch_that_is_left_out_is_told(tmp_path: Path) -> None:
    with pytest.raises(PipeOptimError, match=r"the loss is nan at step 9, on stage 1; .* resume from step 8 with"):
        run(SPOILED, tmp_path / "stopped", progress=False)
    result = run(replace(SPOILED, on_bad="skip"), tmp_path / "skipped", progress=False)
    assert [row["step"] for row in result.rows() if row.get("skipped")] == [9]  # one forward was the probe of the setup
    assert [stage.skipped for stage in result.stages] == [1, 1]
    assert result.train_loss is not None


def test_replicas_are_refused() -> None:
    config = replace(SPOILED, on_bad="skip", engine="processes", replicas=2)
    with pytest.raises(ConfigError, match="on_bad is 'skip', but 2 replicas would have to agree"):
        run(config, Path("nowhere"), progress=False)
