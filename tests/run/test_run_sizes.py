"""Runs with slack, and with sizes that change on the way: the same on both engines, and when they are resumed in the middle."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

import tiny
from compare import assert_same_state, timeless
from pipeoptim.cli.settings import with_given
from pipeoptim.compare.plan import plan_comparison
from pipeoptim.compare.settings import ComparisonSettings
from pipeoptim.config import read_ramp
from pipeoptim.errors import ConfigError
from pipeoptim.train import run
from pipeoptim.train.api import check_possible
from pipeoptim.train.checks import check
from pipeoptim.train.ramps import SizePlan

RAMP = replace(
    tiny.recipe(), stages=3, slack="1", microbatches_schedule="0:1,10:4", batch_size_schedule="0:4,10:8,17:16", uneven=True
)


def test_a_ramp_is_the_same_on_both_engines_and_when_it_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(RAMP, tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch:
        patch.setenv("TINY_CRASH_AT", str(SizePlan(RAMP).at(19).batch(19)))
        with pytest.raises(OSError, match="disk"):
            run(RAMP, tmp_path / "halves", progress=False)
    assert run(RAMP, tmp_path / "halves", resume=True, progress=False).step == 24
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)  # processes import tiny as well
    result = run(replace(RAMP, engine="processes"), tmp_path / "processes", progress=False)
    assert [stage.gap for stage in result.stages] == [1, 1, 0]  # with M = 4: stage 0 is 4 micro-batches ahead
    for name in ("halves", "processes"):
        assert_same_state(tmp_path / "whole", tmp_path / name)
        assert timeless(tmp_path / "whole") == timeless(tmp_path / name)
    plain = replace(RAMP, slack="0", microbatches_schedule="", batch_size_schedule="")
    run(plain, tmp_path / "plain", progress=False)
    with pytest.raises(AssertionError, match="differs"):
        assert_same_state(tmp_path / "whole", tmp_path / "plain")


def test_the_data_go_on_behind_what_was_used() -> None:
    plan = SizePlan(replace(tiny.recipe(), batch_size=32, batch_size_schedule="3:64,5:48", microbatches_schedule="4:2"))
    used = [(part.batch(step), part.batch_size, part.microbatches) for step in range(7) for part in (plan.at(step),)]
    assert used == [(0, 32, 1), (1, 32, 1), (2, 32, 1), (2, 64, 1), (3, 64, 2), (6, 48, 2), (7, 48, 2)]  # 6: behind sample 256


def test_impossible_sizes_are_refused_before_anything_is_made() -> None:
    for text in ("1", "0:0", "5:1,3:2", "0:1,0:2", "-1:2", "0:1:2", "a:b", "0:1,"):
        with pytest.raises(ConfigError, match="must be mini-batches and numbers"):
            read_ramp(text)
    for changes, words in (
        ({"microbatches_schedule": "0:1,5:3"}, "batch_size 8 cannot be split into 3 equal micro-batches"),
        ({"batch_size_schedule": "5:9", "microbatches": 2}, "batch_size 9 cannot be split into 2"),
        ({"batch_size_schedule": "5:16", "steps": 0, "epochs": 2}, "epochs cannot be counted"),
        ({"microbatches_schedule": "5:2", "trace": True}, "leave trace out"),
        ({"microbatches_schedule": "0:8,5:2", "method": "pipedream_2bw", "stages": 4}, "microbatches is 2"),
        ({"slack": "1", "method": "gpipe"}, "order 'gpipe' cannot have slack"),
        ({"slack": "1,1"}, "must have one for each of the 1 boundaries"),
        ({"slack": "fast"}, "slack is 'fast'"),
        ({"slack": "auto"}, "set engine to 'processes'"),
    ):
        with pytest.raises(ConfigError, match=words):
            check(replace(tiny.recipe(), **changes))  # type: ignore[arg-type]
    check_possible(replace(tiny.recipe(), slack="auto", engine="processes"))
    check(replace(tiny.recipe(), microbatches_schedule="0:4", method="pipedream_2bw", stages=4))  # M = 1 is never used


def test_a_number_of_micro_batches_without_effect_is_refused() -> None:
    ramp = replace(tiny.recipe(), microbatches_schedule="0:1,5:2")
    assert with_given(ramp, {"batch_size": 16}).batch_size == 16
    assert with_given(replace(ramp, microbatches_schedule="5:2"), {"microbatches": 4}).microbatches == 4
    with pytest.raises(ConfigError, match="microbatches is 2, but microbatches_schedule '0:1,5:2' says"):
        with_given(ramp, {"microbatches": 2})


def test_a_comparison_with_slack_runs_synchronous_methods_without() -> None:
    config = replace(tiny.recipe(), slack="1", stages=4)
    plan = plan_comparison(ComparisonSettings(config, ["1f1b", "pipeoptim", "spectrain"], [0]))
    assert {planned.config.method: planned.config.slack for planned in plan.runs} == {"1f1b": "0", "pipeoptim": "1"}
    assert "by a formula for the depth alone" in plan.left_out["spectrain"]
