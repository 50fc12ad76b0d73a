"""The page as text: it holds everything, asks for nothing from elsewhere, and texts cannot break out of it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from compare_cases import recipe, write_comparison, write_run
from pipeoptim.compare.api import read
from pipeoptim.compare.report import write_report, write_run_report
from pipeoptim.compare.report.page import page
from pipeoptim.compare.report.series import HUES, POINTS, Series, axis_top, comparison_series, thinned
from pipeoptim.errors import ConfigError
from pipeoptim.methods import METHODS

LOSSES = {name: {0: [2.0, 1.0 + n], 1: [2.0, 1.5 + n]} for n, name in enumerate(METHODS)}


class Page(HTMLParser):
    """Tags with their attributes, and the text outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._in = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in = tag

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in == "script":
            self.scripts.append(data)
        elif self._in != "style":
            self.text += data


def test_complete_and_self_contained(tmp_path: Path) -> None:
    folder, _ = write_comparison(tmp_path / "c", LOSSES)
    text = write_report(folder.path).read_text()
    found = Page(text)
    for tag, attributes in found.tags:
        assert tag not in ("link", "img", "iframe", "object"), tag
        assert not {"src", "href", "srcset", "action"} & attributes.keys(), (tag, attributes)
    assert "url(" not in re.sub(r"<script.*?</script>", "", text, flags=re.S)
    words = " ".join(found.text.split())
    for name, method in METHODS.items():
        assert name in words and " ".join(method.source.split()) in words
    for expected in ("abacus", "pipeoptim compare --of <tests>", "made <up>", "never flushed", "flushed after each mini-batch"):
        assert expected in words
    data = json.loads(next(s for s in found.scripts if s.startswith('{"series"')))
    assert {one["name"] for one in data["series"]} == set(METHODS)
    assert sum(tag == "tr" for tag, _ in found.tags) == 1 + len(METHODS)
    assert len({(one["colour"], one["dash"]) for one in data["series"]}) == len(METHODS), "no two look the same"


def test_texts_cannot_break_out_of_the_page() -> None:
    text = page("<b>", [], {"series": [], "name": "</script><script>alert(1)</script>"})
    assert "<title>&lt;b&gt;</title>" in text and "</script><script>alert" not in text


def test_thinning_keeps_the_mean_and_the_last_step() -> None:
    x, y = thinned(list(range(1, 1001)), [float(s) for s in range(1, 1001)])
    assert len(x) == len(y) == POINTS and x[-1] == 1000
    assert sum(y) / POINTS == pytest.approx(500.5, rel=1e-2)
    assert thinned([], []) == ([], [])


def test_axis_shows_every_end_but_not_one_spike(tmp_path: Path) -> None:
    losses = {name: {0: [2.0, 1.0, 1.0, 1.0]} for name in ("1f1b", "gpipe", "naive")} | {"xpipe": {0: [2.0, 900.0, 4.0, 4.0]}}
    series = comparison_series(read(write_comparison(tmp_path / "c", losses)[0]))
    top = axis_top(series)
    assert top is not None and 4.0 <= top < 20
    assert axis_top([]) is None


def test_synchronous_methods_are_grey(tmp_path: Path) -> None:
    series: list[Series] = comparison_series(read(write_comparison(tmp_path / "c", LOSSES)[0]))
    grey = {one.name for one in series if one.colour.startswith("--grey")}
    assert grey == {name for name, method in METHODS.items() if method.program(1, 1).flushes}
    style = (Path(__file__).parents[2] / "src/pipeoptim/compare/report/style.css").read_text()
    assert all(f"{one.colour}:" in style for one in series) and f"--hue-{HUES}:" not in style


def test_page_of_one_run(tmp_path: Path) -> None:
    write_run(tmp_path / "r", recipe(), [2.0, 1.0])
    result = json.loads((tmp_path / "r/result.json").read_text())
    machine = {"processor": "abacus", "cores": 2, "gpus": [], "system": "none"}
    (tmp_path / "r/result.json").write_text(json.dumps(result | {"machine": machine}))
    found = Page(write_run_report(tmp_path / "r").read_text())
    words = " ".join(found.text.split())
    assert "validation loss 1.0000" in words and "Stages" in words and "103 B" in words
    assert "Click a method" not in words
    assert "2 cores of abacus" in words and f"pipeoptim train --config {tmp_path}/r/config.json --name r-again" in words
    (tmp_path / "r/metrics.jsonl").unlink()
    with pytest.raises(ConfigError, match="no figures yet"):
        write_run_report(tmp_path / "r")
