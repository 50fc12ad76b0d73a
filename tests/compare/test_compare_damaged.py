"""Reports of runs and comparisons whose files were damaged: one sentence that names the folder or the file."""

import json

import pytest

from compare_cases import write_run
from pipeoptim.cli.app import _run


@pytest.fixture
def run(tmp_path):
    from compare_cases import recipe

    write_run(tmp_path / "run", recipe(), [3.0, 2.0, 1.0])
    (tmp_path / "run" / "config.json").write_text(recipe().to_json())
    return tmp_path / "run"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "3",
        "[]",
        "\0",
        "[" * 100_000,
        json.dumps({"samples_per_second": "fast"}),
        json.dumps({"stages": [{}]}),
        '{"stages": 3}',
    ],
)
def test_a_damaged_result_is_told_of(content, run, capsys):
    (run / "result.json").write_text(content)
    assert _run(["report", str(run)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "damaged" in line and str(run) in line
