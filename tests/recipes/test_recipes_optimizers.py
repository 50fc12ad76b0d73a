"""The default recipe at four stages with every optimizer, mixed ones too: processes compute what the emulator computes.

Everything else is switched on as well: bfloat16, clipping by the exact global norm, warm-up and cosine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

import optimizer_cases as cases
import stage_processes
from pipeoptim.rules import CombinedOptimizer
from pipeoptim.train import engines, optimizers


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("optimizers")
    stage_processes.run(Path(__file__).with_name("optimizer_worker.py"), cases.STAGES, str(folder), timeout=270)
    return [torch.load(folder / f"{k}.pt", weights_only=True) for k in range(cases.STAGES)]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("name", cases.CASES)
def test_processes_equal_the_emulator_bit_for_bit(name: str, theirs: list[dict[str, Any]]) -> None:
    run = cases.run_setup(name)
    begun = [p.detach().clone() for stage in run.stages for p in stage.parameters()]
    pipe, _ = engines.make_emulator(run, run.task.loss)
    ours = cases.train(run, pipe)
    for k in range(cases.STAGES):
        assert ours[k]["state"]["version"] == cases.STEPS
        pairs = list(zip(tree_leaves(ours[k]), tree_leaves(theirs[k][name]), strict=True))
        assert all(same(a, b) for a, b in pairs), f"stage {k} differs"
    ended = [p for stage in run.stages for p in stage.parameters()]
    assert all(bool(torch.isfinite(p).all()) for p in ended)
    assert sum(not torch.equal(a, b) for a, b in zip(begun, ended, strict=True)) > 0.9 * len(ended)
    assert len({ours[k]["norm"] for k in range(cases.STAGES)}) == 1, "the norm is that of all stages"
    assert ours[0]["norm"] > 0.5, "nothing was clipped"


def test_every_optimizer_takes_part() -> None:
    """A new class of torch.optim gets into the cases by itself."""
    assert {*optimizers.known(), *optimizers.ALIASES} - cases.ALONE <= set(cases.CASES)
    run = cases.run_setup("one per stage")
    made = [run.optimizer(stage.parameters(), k) for k, stage in enumerate(run.stages)]
    assert [type(optimizer) for optimizer in made] == [CombinedOptimizer, torch.optim.SGD, torch.optim.NAdam, torch.optim.AdamW]
    assert [optimizer.param_groups[0]["lr"] for optimizer in made] == [0.002, 0.1, 0.002, 0.003]
