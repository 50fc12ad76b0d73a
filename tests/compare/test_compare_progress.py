"""One bar for the whole comparison in a terminal, a line per run elsewhere."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from compare_cases import recipe
from pipeoptim.compare.folder import ComparisonFolder
from pipeoptim.compare.plan import plan_comparison
from pipeoptim.compare.progress import Progress
from pipeoptim.compare.settings import ComparisonSettings


def rows(path: Path, steps: int) -> None:
    path.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, steps + 1))
    (path / "metrics.jsonl").write_text(text + '{"step": 9')  # a row that is being written


@pytest.mark.parametrize("terminal", [True, False])
def test_the_bar_counts_the_steps_of_all_runs(terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=120, no_color=True, highlight=False)
    monkeypatch.setattr("pipeoptim.compare.progress.Console", lambda quiet, highlight: console)
    folder, plan = ComparisonFolder(tmp_path), plan_comparison(ComparisonSettings(recipe(), ("gpipe", "pipeoptim"), (0, 1)))
    first, second, third, _ = plan.runs
    with Progress(folder, total=4, done=1, steps=20, quiet=False) as progress:
        progress.began(second)
        progress.began(third)
        progress.look()  # nothing is there yet
        rows(folder.run(second.name), 5)
        rows(folder.run(third.name), 2)
        progress.look()
        if terminal:
            assert progress.bar is not None
            (task,) = progress.bar.tasks
            assert (task.completed, task.total) == (7, 60), "one of four runs of 20 steps was finished before"
            assert "1/4 runs" in task.description and second.name in task.description
        (folder.run(second.name) / "outcome.json").write_text(json.dumps({"status": "finished", "step": 20}))
        progress.ended(second)
        (folder.run(third.name) / "outcome.json").write_text(json.dumps({"status": "failed", "reason": "it rained"}))
        progress.ended(third)
        progress.look()
        if terminal:
            assert progress.bar is not None and progress.bar.tasks[0].completed == 40
    out = text.getvalue()
    assert "1 of 4 runs were finished before" in out
    assert (f"2/4 {second.name} finished" in out) != terminal, "in a terminal the bar says it"
    assert f"3/4 {third.name} failed: it rained" in out
    assert first.name not in out
