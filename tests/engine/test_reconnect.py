"""Processes that give up what is in flight, connect anew and load a boundary go on as if nothing had happened, bit for bit."""

from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

import pipeoptim as po
import reconnect_cases as cases
import stage_processes

HERE = Path(__file__).parent
PROCESSES = 3


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("reconnect")
    return path, stage_processes.run(HERE / "reconnect_worker.py", PROCESSES, str(path), timeout=300)


@pytest.mark.parametrize("n", range(len(cases.RUNS)), ids=[f"{run.method}-{run.transport}-{run.chunks}" for run in cases.RUNS])
@pytest.mark.parametrize("p", range(PROCESSES))
def test_a_process_that_was_connected_anew_ends_where_one_does_that_never_stopped(written, n, p):
    expected, *others = torch.load(written[0] / f"{n}-{p}.pt", weights_only=True).values()
    assert len(others) == 3
    for found in others:
        for a, b in zip(tree_leaves(expected), tree_leaves(found), strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("n", range(len(cases.RUNS)))
@pytest.mark.parametrize("breaks", ["step", "evaluation"])
def test_the_processes_beside_the_one_that_breaks_are_not_left_waiting(written, n, breaks):
    lines = [[line for line in output.splitlines() if line.startswith(f"case {n} broken in {breaks}")] for output in written[1]]
    assert lines[1] == [f"case {n} broken in {breaks}: OSError: a disk was full"]
    assert all("StageFailure" in line for p in (0, 2) for line in lines[p])
    assert lines[0] or lines[2], "nobody waited for the process that broke"


def test_replicas_are_not_connected_anew():
    pipe = object.__new__(po.Schedule)
    pipe._replica_sets = {0: object()}
    with pytest.raises(po.ConfigError, match="cannot be connected anew; make a new one, and load the last checkpoint"):
        pipe.reconnect()
