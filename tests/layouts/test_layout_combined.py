"""Several stages per process beside replicas, sharded stages, and shards within replicas: each equals the whole batch."""

import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "engine"))
import combined_cases as cases  # noqa: E402
import stage_processes  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("combined")
    stage_processes.run(HERE / "combined_worker.py", 4, str(path), timeout=200)
    return path


@pytest.mark.parametrize("n", range(len(cases.CASES)), ids=lambda n: f"{cases.CASES[n].name()}-{cases.CASES[n].chunks}")
def test_combined_layouts_equal_the_whole_batch(folder, n):
    case = cases.CASES[n]
    pipe, losses = cases.emulate(case)
    found = [torch.load(folder / f"{n}-{rank}.pt", weights_only=True) for rank in range(4)]
    seen = []
    for theirs in found:
        for k, weights in theirs["weights"].items():
            seen.append((k, theirs["replica"]))
            for name, value in pipe.stage_state_dict(k)["module"].items():
                torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-10)
            assert theirs["gaps"][k] == [pipe.version_gap(k, i) for i in range(case.m)]
    assert sorted(seen) == [(k, r) for k in range(case.depth) for r in range(case.replicas)]
    told = torch.stack([torch.stack(theirs["losses"]) for theirs in found if case.depth - 1 in theirs["weights"]])
    torch.testing.assert_close(told.mean(0), losses, rtol=0, atol=1e-10)
    assert any(gap for gaps in found[0]["gaps"].values() for gap in gaps), "nothing here is asynchronous"


@pytest.mark.parametrize("n", [4, 6])
def test_sharded_stages_resume_bit_for_bit(folder, n):
    for rank in range(4):
        whole, halves = torch.load(folder / f"resumed-{n}-{rank}.pt", weights_only=True)
        for k, weights in whole.items():
            for name, value in weights.items():
                assert torch.equal(value, halves[k][name]), (rank, k, name)


def test_sharded_stages_export_the_whole_model_and_refuse_what_one_pipeline_lacks(folder):
    pipe, _ = cases.emulate(cases.CASES[4])
    weights = [value for k in range(4) for value in pipe.stage_state_dict(k)["module"].values()]
    for rank in range(4):
        found = torch.load(folder / f"exported-{rank}.pt", weights_only=True)
        assert len(found["told"]) == 3
        assert all("is sharded over its replicas" in told for told in found["told"])
        if rank % 2:
            assert found["full"] is None
        else:  # stage 0 of either replica
            torch.testing.assert_close(list(found["full"].values()), weights, rtol=0, atol=1e-10)
