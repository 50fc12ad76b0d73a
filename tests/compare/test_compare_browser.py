"""The page in a real browser, opened from the disk: it draws, fetches nothing, says nothing on the console, fits every screen."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from browser import needs_browser, open_browser
from compare_cases import recipe, write_comparison, write_run
from pipeoptim.compare.report import write_report, write_run_report

pytestmark = needs_browser

LOSSES: dict[str, dict[int, Any]] = {
    "1f1b": {0: [2.0, 1.0, 0.9], 1: [2.1, 1.1, 1.0]},
    "naive": {0: [2.5, 2.0, 1.9], 1: [2.4, 2.2, 2.0]},
    "pipeoptim": {0: [2.3, 1.4, 1.3], 1: [2.2, 1.5, 1.2]},
    "pipedream+vertical_sync": {0: [2.5, 2.3, 2.2], 1: "diverged"},
    "pipemare(anneal_updates=1000, decay=0.135, synchronous_updates=10)": {0: [2.2, 1.7, 1.5], 1: [2.2, 1.6, 1.5]},
}
SIZES = [(1280, 900), (390, 844)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as driver:
        yield driver


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, _ = write_comparison(tmp_path_factory.mktemp("page") / "c", LOSSES, steps=60, engine="processes")
    return write_report(folder.path)


def show(browser: Any, page: Path, size: tuple[int, int] = SIZES[0], scheme: str = "light") -> None:
    """Open ``page`` at a size, in light or dark, with an empty log."""
    browser.get("about:blank")
    browser.get_log("browser"), browser.get_log("performance")
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size[0] < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get(page.as_uri())


def lines_drawn(browser: Any, chart: str) -> int:
    """Those that a reader sees."""
    return int(
        browser.execute_script(
            "return [...document.querySelectorAll(`#${arguments[0]} path.line`)].filter(p => p.getTotalLength() > 10"
            " || p.closest('svg').querySelector('.lost')).length",
            chart,
        )
    )


def test_draws_and_is_silent(browser: Any, report: Path) -> None:
    show(browser, report)
    assert lines_drawn(browser, "validation") == len(LOSSES)
    assert lines_drawn(browser, "train") == len(LOSSES) + 1, "one seed diverged and has a line of its own"
    assert len(browser.find_elements("css selector", "#train path.lost")) == 1
    assert len(browser.find_elements("css selector", "#validation path.band")) >= 4
    assert len(browser.find_elements("css selector", "table.sortable tbody tr")) == len(LOSSES)
    assert len(browser.find_elements("css selector", "figure.schedule svg")) == 2
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert {url.split(":")[0] for url in requests} <= {"file", "data", "blob"}, requests
    assert [url for url in requests if url.startswith("file")] == [report.as_uri()]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: str(size[0]))
def test_fits_and_is_legible(browser: Any, report: Path, size: tuple[int, int], scheme: str) -> None:
    show(browser, report, size, scheme)
    assert browser.execute_script("return matchMedia('(prefers-color-scheme: dark)').matches") == (scheme == "dark")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= size[0]
    wide = browser.execute_script(
        "return [...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll') && !e.closest('.chart')"
        " && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
    )
    assert wide == []
    for selector in ("body", ".quiet", "td", ".chip"):
        assert contrast(browser, selector) >= 4.5, selector
    ticks = browser.execute_script("return getComputedStyle(document.querySelector('#train text.xtick')).fill")
    assert ticks == browser.execute_script("return getComputedStyle(document.querySelector('.quiet')).color"), "charts follow"


def contrast(browser: Any, selector: str) -> float:
    """Contrast of a text with the paper below it (WCAG 2, relative luminance)."""
    colours = browser.execute_script(
        "return [getComputedStyle(document.querySelector(arguments[0])).color, getComputedStyle(document.body).backgroundColor]",
        selector,
    )
    light = sorted(map(luminance, colours))
    return (light[1] + 0.05) / (light[0] + 0.05)


def luminance(colour: str) -> float:
    numbers = [int(part) / 255 for part in colour.split("(")[1].rstrip(")").split(",")[:3]]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in numbers]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_switches(browser: Any, report: Path) -> None:
    show(browser, report)
    chips = browser.find_elements("css selector", ".chip")
    assert [chip.text for chip in chips] == list(LOSSES)
    chips[1].click()
    assert chips[1].get_attribute("aria-pressed") == "false" and lines_drawn(browser, "validation") == len(LOSSES) - 1
    chips[1].click()
    assert lines_drawn(browser, "validation") == len(LOSSES)
    from selenium.webdriver import ActionChains

    ActionChains(browser).double_click(chips[2]).perform()
    assert [chip.get_attribute("aria-pressed") for chip in chips] == ["false", "false", "true", "false", "false"]
    ActionChains(browser).double_click(chips[2]).perform()
    assert {chip.get_attribute("aria-pressed") for chip in chips} == {"true"}


def last_tick(browser: Any) -> str:
    return str(browser.execute_script("return [...document.querySelectorAll('#validation .xtick')].at(-1).textContent"))


def test_wall_clock_axis(browser: Any, report: Path) -> None:
    """60 steps of 8 samples at 80 samples/s take 6 seconds."""
    show(browser, report)
    title = "return document.querySelector('#validation .xtitle').textContent"
    assert "step" in browser.execute_script(title) and last_tick(browser) == "60"
    browser.find_element("css selector", "input[value=seconds]").click()
    assert "time" in browser.execute_script(title) and last_tick(browser) == "6"


def test_what_leaves_the_chart_is_said_and_a_logarithmic_axis_shows_it(browser: Any, tmp_path: Path) -> None:
    losses = {name: {0: [2.0, 1.0, 1.0, 1.0]} for name in ("1f1b", "gpipe", "naive")} | {"xpipe": {0: [2.0, 900.0, 4.0, 4.0]}}
    show(browser, write_report(write_comparison(tmp_path / "c", losses, steps=1000)[0].path))
    outside = (
        "const right = e => e.getBoundingClientRect().right;"
        "const ticks = [...document.querySelectorAll('#train .xtick')].map(right);"
        "return right(document.querySelector('#train svg')) - Math.max(...ticks)"
    )
    assert last_tick(browser) == "1,000" and browser.execute_script(outside) >= 0, "a tick at the edge is not cut"
    cut = "return document.querySelector('#validation-cut').textContent"
    assert "Above the top: xpipe (up to 900)" in browser.execute_script(cut)
    browser.find_element("css selector", "input[name=log-y]").click()
    assert browser.execute_script(cut) == ""
    ticks = browser.execute_script("return [...document.querySelectorAll('#validation .ytick')].map(t => t.textContent)")
    assert "1" in ticks and "100" in ticks


def test_smoothing_slides_and_a_frame_zooms(browser: Any, report: Path) -> None:
    from selenium.webdriver import ActionChains

    show(browser, report)
    path, said = (
        "return document.querySelector('#train path.line').getAttribute('d')",
        "return document.querySelector('#smoothed').value",
    )
    before = browser.execute_script(path)
    slide = "const s = document.querySelector('[name=smoothing]'); s.value = 15; s.dispatchEvent(new Event('input'))"
    browser.execute_script(slide)
    assert browser.execute_script(path) != before and browser.execute_script(said) == "mean of 15 steps"
    chart = browser.find_element("css selector", "#validation")
    assert last_tick(browser) == "60"
    ActionChains(browser).move_to_element_with_offset(chart, -60, -60).click_and_hold().move_by_offset(
        90, 90
    ).release().perform()
    assert last_tick(browser) != "60"
    ActionChains(browser).double_click(chart).perform()
    assert last_tick(browser) == "60"


def test_table_sorts(browser: Any, report: Path) -> None:
    show(browser, report)
    heads = browser.find_elements("css selector", "table.sortable thead th")
    column = next(n for n, head in enumerate(heads) if head.text == "val. loss")
    orders = []
    for _ in range(2):
        heads[column].find_element("css selector", "button").click()
        orders.append([row.text.split()[0] for row in browser.find_elements("css selector", "table.sortable tbody tr")])
    assert heads[column].get_attribute("aria-sort") == "descending"
    assert orders[0] == list(reversed(orders[1])) and orders[0][0] == "1f1b"


def test_page_of_one_run(browser: Any, tmp_path: Path) -> None:
    write_run(tmp_path / "r", recipe(), [2.0, 1.5, 1.0, 0.9])
    figures = {"group": 0, "steps": 1, "cosine": 0.9, "best_scale": 1.0, "worse": False}
    measured = [[figures | {"stage": k, "version": n, "relative_error": (k + 1) / n} for k in (0, 1)] for n in (2, 4, 8)]
    with (tmp_path / "r/metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"step": 20, "prediction": one}) + "\n" for one in measured)
    show(browser, write_run_report(tmp_path / "r"))
    assert lines_drawn(browser, "prediction") == 2 + 1, "a line for each stage, and one at 1"
    assert lines_drawn(browser, "train") == 1 and lines_drawn(browser, "validation") == 1
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
