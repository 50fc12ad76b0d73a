"""benchmarks/predicted_runs.py: predictions are made once, part by part, in a folder that need not be there."""

import json
import sys
from pathlib import Path

import pytest


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
