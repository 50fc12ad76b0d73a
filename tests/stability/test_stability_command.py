"""``pipeoptim stability``: tables, JSON, advice, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pipeoptim.cli.app import _run
from pipeoptim.methods import get_method
from pipeoptim.stability import largest_stable_rate, linear_optimizer
from pipeoptim.stability.pipelines import linear_stages


def output(capsys, *arguments):
    assert _run(["stability", *arguments]) == 0
    return capsys.readouterr().out


def test_one_gap_needs_no_torch():
    code = "import sys; from pipeoptim.cli.app import _run; _run(['stability', '--gap', '7']); print('torch' in sys.modules)"
    lines = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    ).stdout.splitlines()
    assert lines[-1] == "False"
    assert lines[1].split() == ["gap", "none", "refined", "decayed", "in_progress", "best"]
    assert lines[2].split()[:2] == ["7", "0.1575"]


def test_every_stage_as_json(capsys):
    found = json.loads(
        output(capsys, "--stages", "3", "--microbatches", "2", "--optimizer", "momentum", "--momentum", "0.5", "--json")
    )
    method = get_method("pipeoptim_stash")
    for kind in ("none", "refined", "in_progress"):
        stages = linear_stages(method, method.program(3, 2), linear_optimizer("momentum", 0.5), kind)
        assert [row["bounds"][kind] for row in found["stages"]] == pytest.approx(
            [largest_stable_rate(stage) for stage in stages]
        )
    assert [row["gap"] for row in found["stages"]] == [1, 1, 0]
    assert (found["synchronous"], found["optimizer"]["decay"]) == (3.0, 0.5)


def test_advice_says_what_limits_and_what_would_help(capsys):
    text = output(capsys, "--stages", "8", "--beta1", "0.9")
    for words in ("stage 0 limits it", "Momentum: 0.99 instead of 0.9", "M = 8 instead of 1"):
        assert words in text
    assert "'refined' predicts 3 updates worse than nothing where a gradient is less than 1 of" in output(
        capsys, "--gap", "3", "--optimizer", "sgd"
    )
    assert "as in synchronous training" in output(capsys, "--stages", "4", "--method", "1f1b")
    assert "no prediction" not in output(capsys, "--gap", "3", "--prediction", "refined")


def test_methods_with_older_weights_and_slack_show_their_gaps(capsys):
    def gaps(*arguments):
        return [row["gap"] for row in json.loads(output(capsys, *arguments, "--json"))["stages"]]

    assert gaps("--stages", "3", "--microbatches", "3", "--method", "pipedream_2bw") == [1, 1, 1]
    assert gaps("--stages", "3", "--slack", "1") == [4, 2, 0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "give either --gap"),
        (("--gap", "1", "--stages", "2"), "give either --gap"),
        (("--gap", "-1"), "must be from 0 to 63"),
        (("--gap", "3", "--method", "naive"), "give --stages instead of --gap"),
        (("--gap", "3", "--discrepancy", "nan"), "discrepancy is nan"),
        (("--gap", "3", "--momentum", "0.9"), "give --beta1"),
        (("--gap", "3", "--optimizer", "sgd", "--beta1", "0.9"), "give --momentum"),
        (("--gap", "3", "--optimizer", "muon"), "not linear"),
        (("--gap", "3", "--prediction", "refind"), "did you mean 'refined'?"),
        (("--stages", "100"), "at most 64 are computed"),
        (("--stages", "60"), "would take"),
        (("--stages", "4", "--method", "spectrain"), "averages of its own"),
        (("--stages", "4", "--method", "pipedream", "--prediction", "refined"), "does not predict"),
        (("--stages", "4", "--discrepancy", "0.5"), "there is none"),
        (("--stages", "4", "--method", "1f1b", "--slack", "1"), "slack"),
        (("--stages", "0"), "must be an integer of at least 1"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(arguments, says, capsys):
    assert _run(["stability", *arguments]) == 2
    assert says in capsys.readouterr().err
