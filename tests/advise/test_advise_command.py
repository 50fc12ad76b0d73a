"""``pipeoptim advise``: text, JSON, what it learns from a run, and what it refuses."""

from __future__ import annotations

import json

import pytest

from pipeoptim.advise import Situation, advise
from pipeoptim.cli.app import _run


def found(capsys, *arguments):
    assert _run(["advise", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_text_names_everything_and_a_command_that_trains_so(capsys):
    assert _run(["advise", "--stages", "8", "--late", "0.3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "pipeoptim, prediction in_progress, M = 14, slack 1"
    assert lines[1] == "B on the latest weights; gap 1; at most 2 copies of the weights"
    assert "  Is M at least D? yes" in lines
    assert any(line.startswith("Cost of staleness: validation loss") for line in lines)
    assert lines[-1] == "pipeoptim train --method pipeoptim --prediction in_progress --stages 8 --microbatches 14 --slack 1"


def test_json_is_the_function(capsys):
    shown = found(capsys, "--stages", "8", "--microbatches", "1", "--copies", "9", "--optimizer", "momentum")
    expected = advise(Situation(8, 1, optimizer="momentum", momentum=0.9, copies=9)).to_dict()
    assert shown == json.loads(json.dumps(expected))
    assert shown["method"] == "pipeoptim_stash"


def test_memory_is_counted_in_copies_of_the_weights(capsys):
    one = ("--stages", "4", "--microbatches", "1", "--weights", "2")
    assert found(capsys, *one, "--memory", "8")["method"] == "1f1b"  # gradients and moments take 6
    assert found(capsys, *one, "--memory", "10")["method"] == "pipeoptim"
    assert found(capsys, *one, "--memory", "16")["method"] == "pipeoptim_stash"
    assert found(capsys, *one, "--memory", "16", "--activations", "1")["method"] == "pipeoptim"
    assert found(capsys, "--stages", "8", "--batch-size", "4")["microbatches"] == 4
    assert found(capsys, "--stages", "8", "--exact")["gap"] == 0


def test_a_run_says_its_depth_batch_and_optimizer_and_how_far_off_its_predictions_were(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = ["train", "--recipe", "digits", "--tiny", "--steps", "8", "--stages", "2", "--optimizer", "momentum", "--lr", "0.01"]
    assert _run([*line, "--monitor-every", "2", "--name", "a", "--quiet"]) == 0
    capsys.readouterr()
    shown = found(capsys, "--run", "a", "--microbatches", "1")
    assert (shown["stages"], shown["method"]) == (2, "pipeoptim")
    assert any(reason.startswith("Measured: predictions err by") for reason in shown["reasons"])
    metrics = tmp_path / "runs/a/metrics.jsonl"
    rows = [json.loads(row) for row in metrics.read_text().splitlines()]
    for row in rows:
        for stage in row.get("prediction", ()):
            stage["relative_error"] = 1.2
    rows.append({"step": 8, "timing": [{"stage": 0, "computing": 0.1}, {"stage": 1, "computing": 0.3}]})
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert any("slowest stage takes 1.5 times the mean" in reason for reason in found(capsys, "--run", "a")["reasons"])
    assert found(capsys, "--run", "a")["method"] == "naive"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "stages is not given"),
        (("--stages", "0"), "stages is 0"),
        (("--stages", "4", "--microbatches", "0"), "microbatches is 0"),
        (("--stages", "4", "--memory", "8"), "both --memory and --weights"),
        (("--stages", "4", "--memory", "8", "--weights", "1", "--copies", "2"), "either --copies"),
        (("--stages", "4", "--memory", "nan", "--weights", "1"), "memory is nan"),
        (("--stages", "4", "--memory", "1", "--weights", "1"), "use more stages"),
        (("--stages", "4", "--activations", "1"), "give them"),
        (("--stages", "4", "--late", "-1"), "late is -1"),
        (("--stages", "4", "--optimizer", "adma"), "unknown optimizer 'adma'"),
        (("--run", "nothing"), "there is no run in runs/nothing"),
        (("--stages", "1000000"), "would take long"),
    ],
)
def test_what_cannot_be_advised_on_is_refused_in_a_sentence(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert _run(["advise", *arguments]) == 2
    assert says in capsys.readouterr().err
