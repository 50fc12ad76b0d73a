"""``pipeoptim methods``: every method of the registry is there, with what follows from its table and nothing else."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from pipeoptim.cli.app import _run
from pipeoptim.compare.facts import explanation, facts, options, steady_bubble
from pipeoptim.methods import METHODS, copies, gap, get_method
from pipeoptim.methods.registry import FACTORIES
from pipeoptim.schedule import ORDERS, Program


def test_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    assert _run(["methods", "--stages", "3", "--microbatches", "3"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    rows = {line.split()[0]: line for line in reversed(lines)}  # the first that begins with a name is its row
    for name, method in METHODS.items():
        gaps = " ".join(str(gap(method, 3, 3, k)) for k in range(3))
        most = max(copies(method, 3, 3, k) for k in range(3))
        assert method.order in rows[name] and f"{most}  {gaps}" in rows[name]


@pytest.mark.parametrize("depth", [4, 8, 16])
def test_nothing_is_cut_off_in_a_narrow_terminal(
    depth: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert _run(["methods", "--stages", str(depth)]) == 0
    out = capsys.readouterr().out
    assert "\N{HORIZONTAL ELLIPSIS}" not in out
    table = out[: out.index("copies: of the weights")].splitlines()
    assert max(map(len, table)) <= 80
    rows = {line.split()[0]: line for line in table if line.strip()}
    assert set(METHODS) <= rows.keys()
    assert (" ".join(map(str, reversed(range(depth)))) if depth < 8 else f"{depth - 1} .. 0") in rows["pipeoptim"]


@pytest.mark.parametrize("name", FACTORIES)
def test_options_are_listed_with_their_meaning(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["methods", name, "--microbatches", "4"]) == 0  # where every method is defined
    out = capsys.readouterr().out
    family, found = options(f"{name}(x=1)")
    assert family == name and found
    for option in found:
        assert option.meaning and f"  {option.name}={option.default!r}  {option.meaning}" in out


@pytest.mark.parametrize("name", METHODS)
def test_one_method(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    drawing = tmp_path / "schedule.svg"
    assert _run(["methods", name, "--stages", "4", "--microbatches", "4", "--svg", str(drawing)]) == 0
    out = capsys.readouterr().out
    method, found = get_method(name), facts(name, 4, 4)
    flat = " ".join(out.split())
    assert method.summary in flat and " ".join(method.source.split()) in flat and " ".join(method.deviations.split()) in flat
    for k in range(4):
        row = (k, found.gaps[k], found.copies[k], found.ahead_forward[k], found.ahead_backward[k], found.in_flight[k])
        assert [str(value) for value in row] in [line.split() for line in out.splitlines()]
    assert "stage 3 |" in out
    root = ET.parse(drawing).getroot()
    assert root.tag.endswith("svg") and name in (root.get("aria-label") or "")


@pytest.mark.parametrize("name", METHODS)
def test_explanations_say_more_than_the_summary(name: str) -> None:
    assert len(explanation(METHODS[name])) > len(METHODS[name].summary) + 20
    assert explanation(get_method("pipemare(synchronous_updates=5)")) == explanation(METHODS["pipemare"])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("m", [1, 3, 8])
def test_bubble(order: str, depth: int, m: int) -> None:
    """Asynchronous orders have none; those that flush idle (D-1) of M+D-1 slots (GPipe, section 2)."""
    expected = (depth - 1) / (m + depth - 1) if ORDERS[order].flushes else 0.0
    assert steady_bubble(Program(order, depth, m)) == pytest.approx(expected)


def test_facts_of_the_design() -> None:
    assert facts("pipedream", 4, 1).copies == (4, 3, 2, 1)
    assert facts("pipeoptim", 8, 1).copies == (2,) * 7 + (1,)
    assert facts("pipeoptim", 4, 1).ahead_forward == facts("pipeoptim", 4, 1).gaps == (3, 2, 1, 0)
    assert facts("spectrain", 4, 1).ahead_backward == (0, 0, 1, 1)
