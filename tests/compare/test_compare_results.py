"""docs/results_short.md says what benchmarks/results/compare-*.json say, and nothing else."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def render() -> ModuleType:
    spec = importlib.util.spec_from_file_location("render_results", ROOT / "benchmarks" / "render_results.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["render_results"] = module
    spec.loader.exec_module(module)
    return module


def test_page_is_up_to_date(render: ModuleType) -> None:
    text = render.PAGE.read_text()
    assert render.render(text, render.load()) == text, "run python benchmarks/render_results.py"
    assert (render.PAGE.parent / re.search(r"!\[.*?\]\((.*?)\)", text)[1]).is_file()


def test_a_number_typed_by_hand_is_noticed(render: ModuleType) -> None:
    text = render.PAGE.read_text()
    changed = re.sub(r"(<!-- number: [^>]* -->)", r"\g<1>9", text, count=1)
    assert changed != text and render.render(changed, render.load()) == text


def test_every_comparison_has_its_table(render: ModuleType) -> None:
    text = render.PAGE.read_text()
    for recipe, data in render.load().items():
        settings = {(c["stages"], c["microbatches"]) for c in data["comparisons"]}
        assert settings == {(4, 1), (4, 4), (8, 1), (8, 8)}
        for depth, m in settings:
            assert f"<!-- comparison: {recipe} D{depth} M{m} -->" in text


def test_results_are_small() -> None:
    assert sum(path.stat().st_size for path in (ROOT / "benchmarks" / "results").glob("compare-*.json")) < 3_000_000
