"""benchmarks/learning.py: which learning rate counts, and which runs are still missing."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def learning(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    import learning

    return learning


def train_all(learning, ledger, setting, losses):
    """Until nothing is missing; returns what was run, as (rate, seed)."""
    ran = []
    while (run := next(ledger.missing([setting]), None)) is not None:
        ran.append((run.rate, run.seed))
        ledger.runs[run.key] = {"val_loss": losses.get(ran[-1])}
    return ran


@pytest.mark.parametrize("later", [(2.0, 2.0), (1.8, 1.8)])
def test_close_rates_are_decided_by_all_seeds(learning, tmp_path, later):
    """At seed 0, 6e-3 is best, 1.2e-2 within 1 % of it, and 3e-3 not."""
    setting = learning.Setting("chars", 8, 8, "adamw", ("naive",))
    ledger, naive = learning.Ledger(tmp_path / "none.json"), learning.CONTENDERS["naive"]
    losses = {(3e-3, 0): 2.0, (6e-3, 0): 1.9, (6e-3, 1): 1.9, (6e-3, 2): 1.9, (1.2e-2, 0): 1.91}
    losses |= {(1.2e-2, seed): loss for seed, loss in zip((1, 2), later, strict=True)}
    ran = train_all(learning, ledger, setting, losses)
    assert ran[:3] == [(3e-3, 0), (6e-3, 0), (1.2e-2, 0)] and sorted(ran) == sorted(losses)
    assert ledger.best(setting, naive).rate == (1.2e-2 if sum(later) < 3.7 else 6e-3)


def test_a_rate_with_a_seed_that_diverged_is_not_the_best(learning, tmp_path):
    setting = learning.Setting("chars", 8, 8, "adamw", ("naive",))
    ledger = learning.Ledger(tmp_path / "none.json")
    losses = {(rate, seed): 1.9 for rate in (3e-3, 6e-3) for seed in range(3)} | {(3e-3, 1): None, (1.5e-3, 0): 2.5}
    losses |= {(1.2e-2, 0): None}
    train_all(learning, ledger, setting, losses)
    assert ledger.best(setting, learning.CONTENDERS["naive"]).rate == 6e-3
