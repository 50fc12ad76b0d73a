"""A comparison read from folders that were written by hand: every figure can be checked by eye."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from compare_cases import write_comparison
from pipeoptim.compare.api import write_summaries
from pipeoptim.compare.table import NONE, columns, fitting, notes

LOSSES = {
    "1f1b": {0: [2.0, 1.0], 1: [2.0, 1.2]},
    "naive": {0: [2.0, 2.0], 1: [2.0, 2.2]},
    "pipeoptim": {0: [1.5, 1.2], 1: [1.1, 1.4]},
}


def test_entries(tmp_path: Path) -> None:
    folder, _ = write_comparison(tmp_path / "c", LOSSES)
    write_summaries(folder)
    entries = json.loads(folder.summary.read_text())
    assert [(e["method"], e["seed"]) for e in entries] == [(m, s) for m in LOSSES for s in (0, 1)]
    one = next(e for e in entries if e["method"] == "pipeoptim" and e["seed"] == 1)
    assert one["final_val_loss"] == 1.4
    assert one["final_train_loss"] == pytest.approx(2.4)
    assert one["target"] == pytest.approx(1.2 * 1.01), "the worst of 1f1b, and one percent"
    assert one["steps_to_target"] == 10
    assert one["seconds_to_target"] == pytest.approx(10 * 8 / 80)
    assert one["share_of_gap_closed"] == pytest.approx((2.1 - 1.4) / (2.1 - 1.1))
    assert one["max_weight_copies"] == 2 and one["weight_bytes"] == 103
    assert one["metrics"] == {"accuracy": 0.5} and one["samples_per_second"] == 80.0
    assert not one["diverged"] and one["status"] == "finished" and one["steps"] == 20
    rows = list(csv.DictReader(folder.table.open()))
    assert len(rows) == 6 and float(rows[0]["final_val_loss"]) == 1.0 and float(rows[0]["metric_accuracy"]) == 0.5


def test_lines(tmp_path: Path) -> None:
    folder, _ = write_comparison(tmp_path / "c", LOSSES)
    comparison = write_summaries(folder)
    lines = {line.method: line for line in comparison.lines()}
    assert lines["1f1b"].share == pytest.approx(1.0) and lines["naive"].share == pytest.approx(0.0)
    assert lines["pipeoptim"].share == pytest.approx(0.8)
    assert lines["pipeoptim"].val_loss is not None and lines["pipeoptim"].val_loss.deviation == pytest.approx(0.02**0.5)
    found = {column.heading: column.cell(lines["pipeoptim"]) for column in columns(comparison)}
    assert found["val. loss"] == "1.3000 ±0.1414" and found["gap closed"] == "80 %" and found["copies"] == "2"
    assert found["steps to target"] == "15", "20 and 10"
    assert not any("gap is given" in note for note in notes(comparison))


def test_diverged_left_out_and_own_optimizers_are_said(tmp_path: Path) -> None:
    losses = {**LOSSES, "xpipe": {0: [1.0, 1.0], 1: "diverged"}, "spectrain": {0: "diverged", 1: "diverged"}}
    losses |= {"nesterov": {0: [1.3, 1.3], 1: [1.3, 1.3]}, "pipedream_2bw": {}}
    folder, _ = write_comparison(tmp_path / "c", losses, microbatches=1)
    comparison = write_summaries(folder)
    entries = json.loads(folder.summary.read_text())
    lost = [e for e in entries if e["diverged"]]
    assert [(e["method"], e["seed"], e["final_val_loss"], e["final_train_loss"]) for e in lost] == [
        ("xpipe", 1, None, None),
        ("spectrain", 0, None, None),
        ("spectrain", 1, None, None),
    ]
    (out,) = [e for e in entries if e["status"] == "left out"]
    assert out["method"] == "pipedream_2bw" and "microbatches" in out["reason"]
    lines = {line.method: line for line in comparison.lines()}
    assert lines["xpipe"].share is None, "a mean over the seeds that did not diverge would flatter"
    cells = {c.heading: c for c in columns(comparison)}
    assert "1 of 2 diverged" in cells["val. loss"].cell(lines["xpipe"])
    assert cells["val. loss"].cell(lines["spectrain"]) == "diverged"
    assert cells["optimizer"].cell(lines["nesterov"]) == "nadam" and cells["optimizer"].cell(lines["naive"]) == "adamw"
    said = "\n".join(notes(comparison))
    for words in ("pipedream_2bw was left out", "xpipe diverged with seed 1", "nesterov uses its own optimizer nadam"):
        assert words in said


def test_validation_that_is_not_finite_at_the_end_has_diverged(tmp_path: Path) -> None:
    folder, _ = write_comparison(tmp_path / "c", {"1f1b": {0: [2.0, 1.0]}})
    metrics = folder.run("1f1b-seed0") / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    rows[-1].pop("val_loss")
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (entry,) = write_summaries(folder).entries()
    assert entry["diverged"] and entry["final_val_loss"] is None


def test_a_loss_that_is_a_number_may_have_diverged_all_the_same(tmp_path: Path) -> None:
    """It began at 3: 5.9 is bad, 6.1 is lost. What is left of naive is no end of a gap."""
    losses = {
        "1f1b": {0: [2.0, 1.0], 1: [2.0, 1.0]},
        "naive": {0: [2.0, 5.9], 1: [2.0, 6.1]},
        "xpipe": {0: [2.0, 1.5], 1: [2.0, 1.5]},
    }
    comparison = write_summaries(write_comparison(tmp_path / "c", losses)[0])
    naive = [e for e in comparison.entries() if e["method"] == "naive"]
    assert [e["diverged"] for e in naive] == [False, True]
    assert naive[1]["reason"] == "it ended at validation loss 6.1, having begun at 3"
    assert all(line.share is None for line in comparison.lines())


def test_without_a_synchronous_method_there_is_no_target(tmp_path: Path) -> None:
    folder, _ = write_comparison(tmp_path / "c", {"naive": {0: [2.0, 1.0]}})
    comparison = write_summaries(folder)
    assert comparison.target is None and comparison.entries()[0]["steps_to_target"] is None
    assert {c.heading for c in columns(comparison)}.isdisjoint({"gap closed", "steps to target", "time to target"})
    folder, _ = write_comparison(tmp_path / "d", {"naive": {0: [2.0, 1.0]}}, target=1.5)
    assert write_summaries(folder).entries()[0]["steps_to_target"] == 20


def test_half_done_comparison_shows_what_is_there(tmp_path: Path) -> None:
    folder, _ = write_comparison(tmp_path / "c", LOSSES)
    (folder.run("pipeoptim-seed1") / "outcome.json").unlink()
    entries = write_summaries(folder).entries()
    assert ("pipeoptim", 1) not in {(e["method"], e["seed"]) for e in entries} and len(entries) == 5


def test_narrow_terminals_lose_the_least_important_columns(tmp_path: Path) -> None:
    comparison = write_summaries(write_comparison(tmp_path / "c", LOSSES)[0])
    found = columns(comparison)
    assert fitting(found, comparison.lines(), 300) == (found, [])
    kept, dropped = fitting(found, comparison.lines(), 80)
    assert dropped and len(kept) + len(dropped) == len(found)
    assert {"method", "val. loss", "copies"} <= {column.heading for column in kept}
    assert all(column.cell(line) != NONE for column in kept for line in comparison.lines())
