"""Traces of real runs: ``pipeoptim train --trace`` on both engines, and what it leaves for people and for programs."""

import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest

sys.path += [str(Path(__file__).parents[1] / "run"), str(Path(__file__).parent)]
from chrome_format import check
from pipeoptim.telemetry.trace.read import read
from pipeoptim.train.result import RunResult
from processes import Command, train

STEPS = 24


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run on both engines: with drains at every checkpoint (8), validations in between (6), and a clip."""
    folder = tmp_path_factory.mktemp("traced")
    found = {}
    for engine in ("processes", "emulator"):
        options = ["--recipe", "tiny:steady", "--trace", "--engine", engine, "--name", engine, "--clip", "1"]
        with train(folder, *options, "--clip-scope", "global") as command:
            assert command.wait(240) == 0, command.err
            found[engine] = folder / "runs" / engine, command.out
    return found


@pytest.mark.parametrize("engine", ["processes", "emulator"])
def test_the_trace_is_in_chromes_format_with_a_row_per_stage_beside_the_ideal(runs, engine):
    folder, _ = runs[engine]
    rows = check(json.loads((folder / "trace/trace.json").read_text()))
    run = next(group for group, _ in rows if group.startswith("run"))
    assert set(rows) == {(run, "stage 0"), (run, "stage 1")} | {
        ("ideal schedule of the same actions", f"stage {k}") for k in range(2)
    }
    for k in range(2):
        real, ideal = rows[run, f"stage {k}"], rows["ideal schedule of the same actions", f"stage {k}"]
        names = [[e["name"] for e in events if e["name"][0] in "FBU" and e["name"][1:].isdigit()] for events in (real, ideal)]
        once = [[name for name, after in pairwise([*row, ""]) if name != after] for row in names]  # U is cut by its wait
        assert once[0] == once[1]
        assert sorted(once[0]) == sorted(f"{kind}{n}" for kind in "FBU" for n in range(STEPS))
        kinds = {e["name"].split(" ")[0] for e in real}
        assert "evaluate" in kinds
        assert ({"data", "checkpoint"} <= kinds) == (engine == "processes" or k == 0)
        assert ({"wait", "send", "receive"} <= kinds) == (engine == "processes")
    assert any(e["name"] == "predict" for e in rows[run, "stage 0"])


def test_no_message_is_taken_before_it_was_sent(runs):
    one, two = read(runs["processes"][0] / "trace")
    messages = 0
    for sender, receiver in ((one, two), (two, one)):
        sent = {s.number: s for s in sender.spans if s.what == "send"}
        for s in receiver.spans:
            if s.what == "receive":
                assert sent[s.number].begin < s.end and s.nbytes > 0
                messages += 1
    assert messages >= 2 * STEPS


@pytest.mark.parametrize("engine", ["processes", "emulator"])
def test_the_result_and_the_summary_tell_the_idle_shares(runs, engine):
    folder, out = runs[engine]
    told = json.loads((folder / "trace/trace.json").read_text())["otherData"]["shares"]
    for facts, shares in zip(RunResult.read(folder).stages, told, strict=True):
        assert facts.ideal_idle == pytest.approx(shares["ideal_idle"], abs=1e-4)
        parts = [shares[name] for name in ("compute", "communication", "waiting", "turns", "other")]
        assert sum(parts) == pytest.approx(1, abs=1e-3) and min(parts) >= 0
        if engine == "processes":
            assert facts.idle == pytest.approx(shares["idle"], abs=1e-4)
            assert 0 < facts.waiting <= facts.idle and facts.communication > 0
            assert shares["turns"] == 0
        else:
            assert facts.idle is facts.waiting is facts.communication is None
    assert "idle in the ideal schedule" in out
    assert f"{RunResult.read(folder).stages[1].ideal_idle:.1%}" in out
    assert "trace/trace.json" in out


def test_tracing_does_not_change_what_is_computed(runs):
    losses = [[row["loss"] for row in RunResult.read(folder).rows() if "loss" in row] for folder, _ in runs.values()]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS
    validations = [[row for row in RunResult.read(folder).rows() if "val_loss" in row] for folder, _ in runs.values()]
    assert validations[0] == validations[1]
    assert [row["step"] for row in validations[0]] == [6, 12, 18, 24]


def test_the_report_shows_where_the_time_went(runs):
    from pipeoptim.compare.report import write_run_report

    for folder, _ in runs.values():
        page = write_run_report(folder).read_text()
        assert "Where the time went" in page
        assert page.count("measured: pipeoptim") == page.count('<text class="ink" x="4" y="15" font-size="13">measured') == 1
    assert "took turns" in page


def test_a_resumed_run_can_be_traced_and_report_merges_a_folder(runs, tmp_path):
    folder, _ = runs["emulator"]
    options = ["--resume", "--name", "emulator", "--steps", "28", "--trace-steps", "2", "--quiet"]
    with train(folder.parents[1], *options) as command:
        assert command.wait(240) == 0, command.err
    for stage in read(folder / "trace"):
        assert [s.number for s in stage.spans if s.what == "F"] == [24, 25]
    with Command([sys.executable, "-m", "pipeoptim", "report", str(folder / "trace")], tmp_path) as command:
        assert command.wait(240) == 0, command.err
        assert "ideal idle" in command.out and "trace.svg" in command.out
