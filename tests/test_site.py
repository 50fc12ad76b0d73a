"""The documentation site: built strictly, complete, silent when opened from the disk; its schedules are those that the engine runs."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pipeoptim as po
from browser import needs_browser, open_browser
from pipeoptim.explained import explanations
from pipeoptim.methods.facts import weight_use

ROOT = Path(__file__).parents[1]
pytest.importorskip("mkdocs")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_and_every_public_name_is_there(site):
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} | {"CHANGELOG", "CONTRIBUTING", "SECURITY"}
    assert pages <= {path.stem for path in site.glob("*.html")}
    told = {
        name for path in (site / "api").glob("*.html") for name in re.findall(r'id="(pipeoptim\.[\w.]+)"', path.read_text())
    }
    assert {f"pipeoptim.{name}" for name in po.__all__} - told == {
        f"pipeoptim.{name}" for name in ("METHODS", "__version__", "optim")
    }
    assert {f"pipeoptim.optim.{name}" for name in po.optim.__all__} <= told
    assert {"pipeoptim.Emulator.step", "pipeoptim.Schedule.drain"} <= told, "what is inherited is there as well"
    reference = (site / "api/engine.html").read_text()
    assert "on_bad" in reference and ":class:" not in reference, "options are shown as help() shows them, roles as links"
    shown = {path.name: re.sub(r"<[^>]+>", "", path.read_text()) for path in (site / "api").glob("*.html")}
    assert {name: found for name, text in shown.items() if (found := re.findall(r":(?:class|func|meth|data|mod):", text))} == {}


def test_nothing_is_fetched_from_elsewhere(site):
    for path in [site / "index.html", site / "how_it_works.html", site / "choosing.html"]:
        page = path.read_text()
        assert not re.findall(r'<(?:script|img|link)[^>]*(?:src|href)="(?:https?:)?//', page)
        assert "mermaid" not in page


def messages():
    """What the packages say in their errors, with … for what is filled in."""
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)


def test_every_explained_message_exists_and_names_its_anchor(site):
    page = (ROOT / "docs/troubleshooting.md").read_text()
    names = [part.name for part in explanations()]
    ids = re.findall(r'id="([\w-]+)"', (site / "troubleshooting.html").read_text())
    assert len(names) == len(set(names)) == len(re.findall("^### ", page, re.MULTILINE)) >= 40
    assert set(names) <= set(ids)
    named = {str(po.ConfigError(message)).rpartition("(more: pipeoptim explain ")[2] for message in messages()}
    assert [name for name in names if f"{name})" not in named] == []


def test_an_error_about_an_error_names_one_explanation():
    inner = po.ConfigError("step() was called without gradients; call it outside")
    assert str(inner) == "step() was called without gradients; call it outside (more: pipeoptim explain without-gradients)"
    assert str(po.ConfigError(f"stage 1: {inner}")) == f"stage 1: {inner}"
    assert str(po.ConfigError(f"mine.py:f(x=1) cannot be made: {inner}; see there")).count("more:") == 1
    assert str(po.ConfigError("something else")) == "something else"


def test_a_value_on_several_lines_hides_no_explanation():
    message = str(po.ConfigError("m.py:f(x=Sequential(\n  (0): ReLU()\n)) cannot be made: no"))
    assert message == "m.py:f(x=Sequential( (0): ReLU() )) cannot be made: no (more: pipeoptim explain cannot-be-made)"


def test_versions_lie_beside_one_another(tmp_path):
    """As a release makes them, with a page instead of all: in a clone, whose branch gets a folder for each minor version."""
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout")
    subprocess.run(["git", "clone", "--quiet", "--depth=1", ROOT.as_uri(), tmp_path / "clone"], check=True)
    clone = tmp_path / "clone"
    (clone / "small.yml").write_text(ONE_PAGE)
    git = ["git", "-C", clone, "-c", "core.quotePath=off"]

    def on_branch(path):
        return subprocess.run([*git, "show", f"gh-pages:{path}"], capture_output=True, text=True, check=True).stdout

    identity = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"}
    make = [
        "make",
        "-s",
        "-o",
        f"{sys.prefix}/.installed",
        f"VENV={sys.prefix}",
        "MIKE=--config-file small.yml",
        "site-version",
    ]
    for version in ("0.2.1", "0.3.0"):
        (clone / "src/pipeoptim/version.py").write_text(f'__version__ = "{version}"\n')
        done = subprocess.run(
            make, cwd=clone, env=os.environ | identity, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
    told = [(one["version"], one["aliases"]) for one in json.loads(on_branch("versions.json"))]
    assert told == [("0.3", ["latest"]), ("0.2", [])]
    assert '"latest/"' in on_branch("index.html") and on_branch("latest") == "0.3"
    for version in ("0.2", "0.3"):
        assert '"provider": "mike"' in on_branch(f"{version}/index.html"), "whose choice of versions is shown"


ONE_PAGE = """
INHERIT: mkdocs.yml
nav: [index.md]
hooks: [docs_site/versions.py]
plugins: [search]
validation: {links: {not_found: ignore}}
exclude_docs: |
  *.md
  !index.md
"""


def schedules(site):
    return json.loads((site / "assets/schedules.js").read_text().removeprefix("const SCHEDULES = ").removesuffix(";\n"))


def test_the_viewer_has_the_programs_that_the_engine_runs(site):
    data = schedules(site)
    assert set(data["methods"]) == set(po.METHODS)
    for key, told in data["programs"].items():
        order, depth, m, slack = key.split("/")
        (method,) = [method for method in po.METHODS.values() if method.order == order][:1]
        program = method.program(int(depth), int(m), slack=int(slack))
        for k, line in enumerate(told["spans"]):
            actions = [one.split("@")[0] for one in line.split()]
            minibatches = sum(one.startswith("U") for one in actions)
            assert actions == [str(action) for action in program.full(k, minibatches)]


@needs_browser
def test_the_viewer_in_a_browser_counts_what_the_methods_do(site):
    """Every method at D = 4: from which version F of stage 0 predicts, or which it uses, beside the engine's own bookkeeping."""
    with open_browser() as browser:
        browser.get((site / "how_it_works.html").as_uri())
        for name, method in po.METHODS.items():
            for m in (1, 4):
                shown = browser.execute_script(SHOW, name, m)
                try:
                    program = method.program(4, m)
                except po.ConfigError:
                    assert shown == "not defined"
                    continue
                used = weight_use(method, program, 0).gaps
                before = {i: i // m for i in used}  # updates of the stage before B of micro-batch i
                known = min(len(shown), len(used))
                assert known >= 4 and shown[:known] == [before[i] - used[i] for i in range(known)], (name, m)
        assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


SHOW = """
const viewer = document.querySelector(".schedule-viewer");
for (const [name, value] of [["method", arguments[0]], ["D", 4], ["M", arguments[1]], ["slack", 0]]) {
  const field = viewer.querySelector(`select[name=${name}]`);
  field.value = value;
  field.dispatchEvent(new Event("change"));
}
if (viewer.textContent.includes("is not defined here")) return "not defined";
return [...viewer.querySelectorAll("[data-k='0'][data-action^=F]")].map((cell) => {
  cell.dispatchEvent(new Event("click"));
  const told = viewer.querySelector(".told").textContent.match(/F on (.*?\\))/)[1];
  return +(told.match(/predicted from version (\\d+)/) || told.match(/W(\\d+)/))[1];
});
"""
