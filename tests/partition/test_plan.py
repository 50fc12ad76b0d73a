"""``pipeoptim plan`` and the forecast behind it."""

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeoptim.partitioning.forecast import seconds_per_minibatch
from pipeoptim.schedule import Program


@given(stages=st.lists(st.floats(0.5, 5), min_size=1, max_size=6), m=st.integers(1, 4))
def test_an_asynchronous_pipeline_is_as_fast_as_its_slowest_stage_and_a_flush_is_slower(stages, m):
    fast = seconds_per_minibatch(Program("async_1f1b", len(stages), m), stages)
    assert fast >= max(stages) - 1e-9
    assert seconds_per_minibatch(Program("1f1b", len(stages), m), stages) >= fast - 1e-9
    even = [max(stages)] * len(stages)
    assert seconds_per_minibatch(Program("async_1f1b", len(stages), m), even) == pytest.approx(max(stages))
    one_by_one = seconds_per_minibatch(Program("gpipe", len(stages), 1), stages)
    assert one_by_one == pytest.approx(sum(stages))


def command(*arguments):
    env = {**os.environ, "COLUMNS": "160", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "pipeoptim", "plan", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=env,
        check=False,
    )


def test_plan_shows_the_cut_and_every_method(tmp_path):
    import pipeoptim as po

    done = command("--recipe", "digits", "--stages", "3", "--microbatches", "2", "--pin", "2", "--svg", str(tmp_path / "a.svg"))
    assert done.returncode == 0, done.stderr
    assert "stage 2" in done.stdout
    assert "2 blocks: 0 " in done.stdout  # the pin
    for name in po.METHODS:
        assert name in done.stdout
    assert "set microbatches to 3 or more" in done.stdout
    assert (tmp_path / "a.svg").read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--stages", "40"], "use 1 .. 6"),
        (["--recipe", "charss"], "chars"),
        (["--method", "pipeoptimm"], "did you mean 'pipeoptim'"),
        (["--memory", "0.000001"], "must be 4 positive numbers"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, words):
    done = command(*arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
