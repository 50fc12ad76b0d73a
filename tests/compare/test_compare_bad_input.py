"""Input that cannot work: one line that says value, reason and remedy; exit code 2; nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeoptim.cli.app import _run

CASES = {
    "unknown method": (["compare", "--methods", "gpipe,pipoptim"], ["'pipoptim'", "did you mean 'pipeoptim'?"]),
    "no methods": (["compare", "--methods", " , "], ["methods is", "commas"]),
    "all methods refuse": (
        ["compare", "--methods", "pipedream_2bw", "--microbatches", "1"],
        ["no method is left", "microbatches"],
    ),
    "seeds": (["compare", "--seeds", "many"], ["seeds is 'many'", "how many (3)"]),
    "negative seed": (["compare", "--seeds", "0,-1"], ["seeds is '0,-1'"]),
    "jobs": (["compare", "--jobs", "0"], ["jobs is 0", "at least 1"]),
    "unknown recipe": (["compare", "--recipe", "charz"], ["'charz'", "did you mean 'chars'?"]),
    "unknown optimizer": (["compare", "--optimizer", "adanw"], ["'adanw'", "did you mean"]),
    "micro-batches": (["compare", "--recipe", "digits", "--microbatches", "5"], ["batch_size 32", "5 equal micro-batches"]),
    "stages": (["compare", "--recipe", "digits", "--stages", "99"], ["stages is 99"]),
    "lr": (["compare", "--lr", "nan"], ["lr is nan"]),
    "own lr": (["compare", "--own-lr", "0"], ["own-lr is 0"]),
    "steps": (["compare", "--steps", "-3"], ["steps is -3"]),
    "prediction": (["compare", "--prediction", "papier"], ["'papier'", "did you mean 'paper'?"]),
    "engine": (["compare", "--engine", "process"], ["'process'", "did you mean 'processes'?"]),
    "clip": (["compare", "--clip", "-1"], ["clip is -1", "finite number"]),
    "plan of no method": (["plan", "--method", "pipdream"], ["'pipdream'", "did you mean 'pipedream'?"]),
    "option that a method does not have": (
        ["compare", "--methods", "pipemare(sync=3)"],
        [
            "unknown pipemare option 'sync'",
            "known: anneal_updates",
            "pipeoptim methods pipemare",
        ],
    ),
    "results into a folder": (["bench", "memory", "--out", "."], ["out is '.'", "name of a file"]),
    "report of nothing": (["report", "nowhere"], ["nowhere", "not a folder"]),
    "report of another folder": (["report", "."], ["holds no comparison", "no run"]),
    "methods unknown": (["methods", "pipdream"], ["'pipdream'", "did you mean 'pipedream'?"]),
    "methods depth": (["methods", "--stages", "0"], ["stages is 0", "at least 1"]),
    "methods of a million micro-batches": (
        ["methods", "--microbatches", "1000000"],
        ["more than can be counted", "20000 or fewer"],
    ),
    "methods of a million stages": (
        ["methods", "--stages", "1000000"],
        ["more than can be counted", "set depth to 99999 or fewer"],
    ),
    "methods of many stages": (["methods", "--stages", "140"], ["140 stages", "would take minutes", "--stages"]),
    "method of many micro-batches": (["methods", "gpipe", "--microbatches", "9000"], ["would take minutes"]),
    "a million seeds": (["compare", "--seeds", "1000000"], ["seeds is '1000000'", "at most 1000"]),
    "methods refused": (["methods", "pipedream_2bw"], ["microbatches is 1", "set microbatches to 4"]),
    "drawing of all": (["methods", "--svg", "x.svg"], ["--svg draws one method"]),
    "drawing nowhere": (["methods", "gpipe", "--svg", "no/where.svg"], ["the folder no does not exist", "for --svg"]),
}


@pytest.mark.parametrize("name", CASES)
def test_one_line(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, words = CASES[name]
    assert _run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1, captured
    assert all(word in captured.err for word in words), captured.err
    assert not list(tmp_path.iterdir())
