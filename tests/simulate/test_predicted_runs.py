"""benchmarks/predicted_runs.py: predictions are made once, part by part, in a folder that need not be there."""

import json
import sys
from pathlib import Path

import pytest

from pipeoptim.bench.record import Record
from pipeoptim.bench.simulated import columns, error_of


@pytest.fixture
def predicted_runs(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[2] / "benchmarks"), *sys.path])
    import predicted_runs

    return predicted_runs


def test_predictions_are_made_once_wherever_they_go(predicted_runs, tmp_path):
    path, asked = tmp_path / "new" / "folder" / "predictions.json", []

    def predict(part):
        asked.append(part)
        return {"rows": [{"name": part, "run": {}, "predicted": 1.0}], "load": 0.0}

    for part in ("a", "b", "a"):
        predicted_runs.add_predictions(path, part, lambda part=part: predict(part))
    found = json.loads(path.read_text())
    assert asked == [*found["parts"]] == [row["name"] for row in found["rows"]] == ["a", "b"]
    with pytest.raises(SystemExit, match="predictions are made once"):
        predicted_runs.write_predictions(path, lambda: predict("c"))


def test_a_run_is_measured_after_each_of_its_predictions_and_goes_on_where_it_was(predicted_runs, tmp_path):
    predictions, path, done = tmp_path / "predictions.json", tmp_path / "measured.json", []
    rates = iter((2.0, 10.0, 4.0, 8.0))

    class Run:
        def __init__(self, name):
            self.name = name

        def measure(self):
            done.append(self.name)
            return next(rates)

    for n, factor in enumerate((1.0, 1.1)):
        rows = [{"name": name, "run": {"name": name}, "predicted": factor * x} for name, x in (("a", 2.0), ("b", 8.0))]
        predicted_runs.add_predictions(predictions, f"round {n}", lambda rows=rows: {"rows": rows, "load": 0.0})
        for _ in range(2):  # the second time nothing is left to do
            predicted_runs.measure(predictions, path, "simulated real", {}, lambda run: Run(**run))
    assert done == ["a", "b", "a", "b"]
    record = Record.read(path)
    assert {row.name: (row.settings["predicted"], row.samples) for row in record.rows} == {
        "a": ([2.0, 2.2], [2.0, 4.0]),
        "b": ([8.0, 8.8], [10.0, 8.0]),
    }
    # Each prediction is beside its own run: (2/2 + 2.2/4)/2 and (8/10 + 8.8/8)/2.
    assert [error_of(row) for row in record.rows] == pytest.approx([-0.225, -0.05])
    assert [cells[3] for cells in columns(record)[1]] == ["-22.5%", "-5.0%"]


def test_the_least_disturbed_try_counts(predicted_runs, monkeypatch):
    left = [0.3, 0.1, 0.2, 0.04, 0.0]

    class Beside:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.cores = left.pop(0)

    monkeypatch.setattr(predicted_runs, "OtherWork", Beside)
    results = iter("abcde")
    assert predicted_runs.undisturbed(lambda: next(results), tries=3) == ("b", 0.1)
    assert predicted_runs.undisturbed(lambda: next(results), tries=3) == ("d", 0.04)
