"""rate_by_gap: each stage at its own learning rate, like a run with these rates written out; refused where it would do nothing or wrong."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from compare import assert_same_state, timeless
from pipeoptim.compare.table import setting
from pipeoptim.config import Component, TrainConfig
from pipeoptim.errors import ConfigError
from pipeoptim.train import recut, run
from pipeoptim.train.checks import program
from pipeoptim.train.rundir import RunDir
from pipeoptim.train.stage_rates import stage_rates, with_stage_rates


def config() -> TrainConfig:
    """Three stages, whose gradients are 2, 1 and 0 updates old."""
    return replace(tiny.recipe(), stages=3, rate_by_gap=1.0, steps=12)


def rates(given: TrainConfig) -> list[float]:
    return stage_rates(given, program(given))


def one_cycle(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20)


def test_rates_follow_the_gaps() -> None:
    assert rates(config()) == [1 / 3, 1 / 2, 1.0]
    assert rates(replace(config(), rate_by_gap=0.5, slack="1")) == pytest.approx([5**-0.5, 3**-0.5, 1.0])
    # M = D-1: the first stage's micro-batches miss 1, 1, then none of 2; the mean counts.
    assert rates(replace(config(), microbatches=2)) == [1 / 2, 1 / 1.5, 1.0]


def test_a_rate_that_groups_and_stages_share_is_divided_once_for_each() -> None:
    shared, given = torch.tensor(0.6), config()

    def groups(stage: torch.nn.Module | Iterable[torch.nn.Parameter], k: int = 0, /) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(2)], lr=shared)

    make = with_stage_rates(given, program(given), groups)
    found = [[float(group["lr"]) for group in make([], k).param_groups] for k in range(3)]
    assert found == [pytest.approx([rate, rate]) for rate in (0.2, 0.3, 0.6)] and shared == torch.tensor(0.6)


@pytest.mark.parametrize("method", ["pipeoptim", "pipedream"])
def test_equals_rates_by_stage(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = tiny.recipe().optimizer.options
    divided = replace(config(), method=method)
    written = replace(
        divided, rate_by_gap=0.0, optimizer=Component("adamw", {**options, "lr": {"by_stage": [0.01 * (1 / 3), 0.005, 0.01]}})
    )
    run(written, tmp_path / "written", progress=False)
    with monkeypatch.context() as patch:
        patch.setenv("TINY_CRASH_AT", "10")
        with pytest.raises(OSError, match="disk"):
            run(divided, tmp_path / "divided", progress=False)
    run(divided, tmp_path / "divided", resume=True, progress=False)
    assert_same_state(tmp_path / "written", tmp_path / "divided")
    assert timeless(tmp_path / "written") == timeless(tmp_path / "divided")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "1f1b"}, "no gradient is old in method '1f1b' with 3 stages"),
        ({"stages": 1}, "no gradient is old in method 'pipeoptim' with 1 stage;"),
        ({"rate_by_gap": -1.0}, "rate_by_gap is -1.0"),
        ({"rate_by_gap": float("nan")}, "rate_by_gap is nan"),
        ({"slack": "auto", "engine": "processes"}, "slack is 'auto'"),
        ({"microbatches_schedule": "4:2"}, "microbatches_schedule changes the gaps"),
        ({"lr_schedule": Component(f"{__name__}:one_cycle")}, "sets the learning rates itself"),
        ({"model": Component("tiny:tied")}, "learning rates differ, so that its copies would diverge"),
    ],
)
def test_refused(changes: dict[str, object], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        run(replace(config(), **changes), tmp_path / "run", progress=False)
    assert len(str(refused.value).splitlines()) == 1 and not (tmp_path / "run").exists()


def test_is_not_cut_anew(tmp_path: Path) -> None:
    run(config(), tmp_path / "run", progress=False)
    for changed in (replace(config(), stages=2), replace(config(), stages=2, rate_by_gap=0.0)):
        with pytest.raises(ConfigError, match="cannot be cut anew"):
            recut(RunDir(tmp_path / "run"), changed)


def test_reports_say_the_rates() -> None:
    assert "on a stage with gap s divided by (1 + s)^1" in setting(config())
    assert "divided" not in setting(replace(config(), rate_by_gap=0.0))
