"""The page of a plan: it has the figures of its files, escapes what is in them, fetches nothing, and fits a phone, also in the dark."""

import json
import re

import pytest

from browser import needs_browser, open_browser
from pipeoptim.cli.app import _run


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    plan, cost = folder / "plan.json", folder / "cost.json"
    arguments = ["--objective", "time", "--synthetic", "--sizes", "layers=4,rows=8", "--devices", "4", "--stages", "4"]
    assert _run(["plan", *arguments, "--microbatches", "4", "--out", str(plan)]) == 0
    assert _run(["cost", "--plan", str(plan), "--samples", "1e6", "--draws", "50", "--out", str(cost)]) == 0
    return plan, cost


@pytest.fixture
def page(files):
    plan, cost = files
    assert _run(["report", str(plan), "--cost", str(cost)]) == 0
    return plan.with_suffix(".html")


def test_the_page_says_what_the_files_say_and_runs_nothing_of_them(files, page, tmp_path):
    plan, cost = (json.loads(one.read_text()) for one in files)
    text = page.read_text()
    for heading in ("Plan", "Simulated timeline", "Memory and time of each stage", "Alternatives", "Cost", "What it hangs on"):
        assert f"<h2>{heading}</h2>" in text
    assert plan["plan"]["command"] in text and "<script" not in text
    for place in cost["places"].values():
        assert f"{place['total USD'][1]:,.0f}" in text
    assert "<td>unknown</td>" in text, "the storage of own hardware"
    assert len(re.findall(r"<a href=\"https://", text)) == sum(len(one["quotes"]) for one in cost["prices"].values())
    evil = "<img src=x onerror=alert(1)>"
    plan["model"] = plan["plan"]["command"] = plan["plan"]["timeline"] = evil
    plan["alternatives"][evil] = None
    (tmp_path / "evil.json").write_text(json.dumps(plan))
    assert _run(["report", str(tmp_path / "evil.json")]) == 0
    assert evil not in (tmp_path / "evil.html").read_text()


def test_files_that_do_not_belong_together_are_refused_and_nothing_is_written(files, tmp_path, capsys):
    plan, cost = files
    data = json.loads(cost.read_text())
    for name, text, words in (
        ("other", json.dumps(data | {"run": data["run"] | {"stages": 7}}), "make it anew with pipeoptim cost --plan"),
        ("cut", cost.read_text()[:500], "is damaged"),
        ("less", json.dumps({key: value for key, value in data.items() if key != "terms"}), "are damaged"),
        ("plan", plan.read_text(), "is no file of pipeoptim cost --out"),
    ):
        ours = tmp_path / "ours.json"
        ours.write_text(plan.read_text())
        (tmp_path / name).write_text(text)
        assert _run(["report", str(ours), "--cost", str(tmp_path / name)]) == 2
        assert words in capsys.readouterr().err and not ours.with_suffix(".html").exists()
    assert _run(["report", str(cost)]) == 2 and "cost.json is no file of pipeoptim plan" in capsys.readouterr().err
    assert _run(["report", str(tmp_path), "--cost", str(cost)]) == 2


@needs_browser
def test_it_opens_offline_and_fits_phones_and_the_dark(page):
    with open_browser() as browser:
        for width, height, scheme in ((1280, 900, "light"), (390, 844, "dark")):
            metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            feature = {"name": "prefers-color-scheme", "value": scheme}
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
            browser.get(page.as_uri())
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width, "only tables scroll sideways"
            drawn = browser.execute_script(
                "const i = document.querySelector('img.timeline'); return [i.complete, i.naturalWidth]"
            )
            assert drawn[0] and drawn[1] > 500, "the browser draws the timeline"
            bars = browser.execute_script(
                "return [...document.querySelectorAll('.bar i')].map(i => i.getBoundingClientRect().width)"
            )
            assert len(bars) > 10 and max(bars) > 50
            paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, re.findall(r"\d+", paper)[:3])) < 200) == (scheme == "dark")
        assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
        messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        assert {url.partition(":")[0] for url in urls} <= {"file", "data"}
        assert {url for url in urls if url.startswith("file")} == {page.as_uri()}
