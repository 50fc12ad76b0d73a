"""2 stages x 2 replicas on 4 processes equal 2 stages with the doubled batch, whoever averages the gradients."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

import layout_cases as cases

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "engine"))
import stage_processes  # noqa: E402


def check_equal(folder, case):
    pipe, losses = cases.emulate(case)
    for k in range(cases.DEPTH):
        expected = pipe.stage_state_dict(k)["module"]
        theirs = [torch.load(folder / f"{case.name()}-{k}-{r}.pt", weights_only=True) for r in range(cases.REPLICAS)]
        for name, weight in expected.items():
            assert torch.equal(theirs[0]["module"][name], theirs[1]["module"][name]), f"{case}: replicas differ in {name}"
            torch.testing.assert_close(theirs[0]["module"][name], weight, rtol=0, atol=1e-10, msg=lambda m: f"{case}: {m}")
        assert theirs[0]["gaps"] == [pipe.version_gap(k, i) for i in range(case.m)]
    found = torch.stack([torch.stack(t["losses"]) for t in theirs]).mean(0)
    torch.testing.assert_close(found, losses, rtol=0, atol=1e-10)


def test_replicas_equal_the_doubled_batch(tmp_path):
    stage_processes.run(HERE / "replicas_worker.py", cases.DEPTH * cases.REPLICAS, str(tmp_path), "plain,ddp")
    for case in cases.plain():
        check_equal(tmp_path, case)
        check_equal(tmp_path, replace(case, wrap="ddp"))
