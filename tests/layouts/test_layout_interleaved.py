"""Two processes with two stages each compute what the emulator computes, bit for bit."""

import re
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "engine"))
import case  # noqa: E402
import interleaved_cases as cases  # noqa: E402
import pipeoptim as po  # noqa: E402
import stage_processes  # noqa: E402


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("interleaved")
    return path, stage_processes.run(HERE / "interleaved_worker.py", 2, str(path), timeout=400)


def emulate(run, m, name, overlap, slack):
    method, options = case.predicted(run)
    modules = case.pieces(4)
    opts = [case.optimizer(name, module.parameters()) for module in modules]
    rates = [case.scheduler(opt) for opt in opts]
    options |= {"schedulers": rates, "seed": 3, "clip": 1.0, "processes": 2, "overlap": overlap, "slack": slack}
    pipe = po.Emulator(modules, opts, case.loss_fn, method, m, **options)
    losses = []
    for n, (x, y) in enumerate(cases.batches()):
        losses.append(pipe.step(x, target=y))
        if n == 7:
            losses.append(pipe.eval_step(x, target=y))
    pipe.drain()
    return pipe, losses


@pytest.mark.parametrize("run", cases.runs(), ids=str)
def test_interleaved_processes_equal_the_emulator_bit_for_bit(written, run):
    pipe, losses = emulate(*run)
    for k in range(4):
        theirs = torch.load(written[0] / case.file_name(*run, k), weights_only=True)
        pairs = zip(tree_leaves(pipe.stage_state_dict(k)), tree_leaves(theirs["state"]), strict=True)
        assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs), f"stage {k} differs"
        assert theirs["gap"] == pipe.version_gap(k)
    assert torch.equal(torch.stack(losses), torch.stack(theirs["losses"]))


def test_slack_that_is_chosen_is_one_number_and_the_same_where_stages_of_one_process_refuse_more(written):
    """Without slack stage 2 predicts nothing, so that it refuses any, which process 1 has no reason to."""
    chosen = [re.search(r"^chose (\d+\.\d)$", output, re.MULTILINE) for output in written[1]]
    assert all(chosen) and chosen[0][1] == chosen[1][1]


def test_a_stop_reaches_all_processes_and_misuse_is_said(written):
    for p, output in enumerate(written[1]):
        assert "fed 3" in output
        assert f"stage {1 - p} belongs on process {1 - p} of its group's 2, not on process {p}" in output
        assert "give at least two stages" in output
        assert "scaler is one GradScaler, but each stage needs its own" in output


@pytest.mark.parametrize("option", cases.DIFFERENT)
def test_processes_that_were_given_different_settings_refuse_to_train(written, option):
    for p, output in enumerate(written[1]):
        (line,) = (line for line in output.splitlines() if line.startswith(f"refused {option} "))
        assert f"process {p} was set up with" in line
        assert line.endswith("give all the same (more: pipeoptim explain options-differ)")
