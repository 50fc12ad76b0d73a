"""Replicas that are given different numbers of mini-batches: the one that ended first is named."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "engine"))
import stage_processes  # noqa: E402


def test_a_replica_that_is_given_less_is_named_by_the_other():
    longer, shorter = stage_processes.run(HERE / "unequal_worker.py", 2, timeout=120)
    assert "replica 1 of stage 0 ended after 4 mini-batches, but replica 0 of stage 0 was given" in longer
    assert shorter == ""
