"""The benchmarks measure what they say: memory by walking, links that are late, cuts, files and what moved between two."""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeoptim.bench import memory, scaling
from pipeoptim.bench.difference import compare
from pipeoptim.bench.efficiency import ALONE
from pipeoptim.bench.goals import Goal, goals, markdown
from pipeoptim.bench.live import LiveStorages
from pipeoptim.bench.models import Workload, _cuts, block_seconds, build
from pipeoptim.bench.record import Record, ResultRow, merged
from pipeoptim.bench.slack_model import efficiency, ideal_windows
from pipeoptim.bench.tables import columns, render_document
from pipeoptim.cli.app import _run
from pipeoptim.engine.transport.message import HEADER
from pipeoptim.errors import ConfigError
from pipeoptim.methods import METHODS
from pipeoptim.schedule import Program


def record(*rows: ResultRow, benchmark: str = "throughput") -> Record:
    return Record(benchmark, "samples/s", {}, list(rows))


def entry(method: str, m: int, *samples: float, ours: bool = True, model: str = "mlp", batch: int = 64) -> ResultRow:
    settings = {"model": model, "batch": batch, "method": method, "microbatches": m, "ours": ours}
    return ResultRow(f"{model}, {batch}, {method} M={m}", list(samples), settings)


def test_live_storages_see_what_autograd_keeps() -> None:
    """Known by hand: sigmoid saves its result, and nobody else holds it; after the backward it is gone."""
    x = torch.zeros(1000, requires_grad=True)
    with LiveStorages() as live:
        live.owner = 3
        y = x.sigmoid().sum()
        live.owner = None
        assert live.live(3) == 4000 + 4
        assert live.live(3, [y]) == 4000
        y.backward()
        assert live.live(3) == 4


def test_memory_of_every_method_is_what_it_promises() -> None:
    found, with_slack = memory.measure([3], width=16, batch=8), memory.measure([3], width=16, batch=8, slack=1.0)
    assert {row.settings["method"] for row in found.rows} == set(METHODS)
    assert {"naive", "pipedream", "pipeoptim", "pipeoptim_stash"} <= {row.settings["method"] for row in with_slack.rows}
    found.rows.extend(with_slack.rows)
    for row in found.rows:
        s = row.settings
        assert row.samples == [s["weights"] * s["weight_copies_promised"]], row.name
        assert s["in_flight"] == pytest.approx(s["in_flight_promised"], abs=0.02), row.name
    stashed = next(row.settings for row in found.rows if row.name == "pipedream D=3 M=1 stage 0")
    assert stashed["weight_copies"] == 3  # not the same for all: the walk sees stashed weights
    lines = {cells[3]: cells[4:] for cells in columns(found)[1] if cells[:3] == ["pipeoptim", "3", "1"]}
    assert lines == {"0": ["2.00", "2", "3 2 1", "3 2 1"], "1": ["2.00", "2", "5 3 1", "5 3 1"]}


def test_memory_walk_sees_activations_that_are_kept_by_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    monkeypatch.setattr(memory, "_loss", lambda out, y: (kept.append(out), (out - y).square().mean())[1])
    last = memory.measure([2], ["1f1b"], [1], width=16, batch=8).rows[-1].settings
    assert last["in_flight"] > 1.5


def test_scaling_measures_growth_and_a_long_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "GROWTH", {"D": [scaling.Size(depth=1), scaling.Size(depth=2)], "M": [scaling.Size(m=2)]})
    found = scaling.measure(updates=200, repeats=1, steps=2)
    assert [line[:2] for line in scaling.columns(found)[1]] == [["D", "1"], ["D", "2"], ["M", "2"]]
    long = [row for row in found.rows if row.settings["grows"] == "updates"]
    assert [len(row.samples) for row in long] == [10, 10]
    for row in long:
        alive = row.settings["tensors_alive"]
        assert row.settings["resident_bytes"][-1] > 1e7
        assert alive[-1] < alive[1] + 40  # something that every mini-batch added would be 160
    assert len(scaling.long_columns(found)[1]) == 2


def test_cuts_balance_measured_time() -> None:
    torch.manual_seed(0)
    small = [nn.Linear(64, 64) for _ in range(3)]
    large = nn.Sequential(*(nn.Linear(64, 64) for _ in range(60)))
    work = Workload([*small, large], torch.randn(32, 64), torch.randn(32, 64), nn.functional.mse_loss)
    assert _cuts(work, [2])[2] == [0, 3, 4]
    assert all(p.grad is None for block in work.blocks for p in block.parameters())


def test_a_timed_backward_adds_to_no_gradients_of_the_last_turn() -> None:
    """Adding is two more passes over the weights: heavy blocks would look slower than they are in training."""
    blocks = [nn.Linear(4, 4) for _ in range(2)]
    before = []
    for block in blocks:
        block.register_forward_pre_hook(lambda module, _: before.append(module.weight.grad))
    block_seconds(Workload(list(blocks), torch.ones(2, 4), torch.ones(2, 4), nn.functional.mse_loss), turns=3)
    assert before == [None] * 6


def test_models_are_named_by_module_and_function() -> None:
    work = build("pipeoptim_zoo.speed:gnmt8", 2)
    out = work.join(*work.blocks)(work.x)
    assert torch.isfinite(work.loss_fn(out, work.y))
    assert torch.equal(next(work.blocks[0].parameters()), next(build("pipeoptim_zoo.speed:gnmt8", 2).blocks[0].parameters()))
    for name, reason in (("gpt", "module:function"), ("torch:zeros", "must return")):
        with pytest.raises(ConfigError, match=reason):
            build(name, 2)


def test_throughput_of_all_schedules_and_late_links(tmp_path: Path) -> None:
    """Two short real runs: every schedule takes part, and a delay of the links is felt by those that wait for each other."""
    out = tmp_path / "t.json"
    command = ["bench", "throughput", "--method", "pipeoptim", "--method", "pipedream_2bw", "--torch-microbatches", "4"]
    command += [
        "--model",
        "pipeoptim_zoo.speed:gnmt8",
        "--fused",
        "--microbatches",
        "2",
        "--refresh",
        "1",
    ]  # tuples, masks, views: the hardest for torch's schedules
    assert _run([*command, "--batch", "8", "--repeats", "1", "--window", "0.02", "--out", str(out)]) == 0
    rows = Record.read(out).rows
    torchs = {row.settings["method"] for row in rows if not row.settings["ours"]}
    assert torchs == {"ScheduleGPipe", "Schedule1F1B", "ScheduleInterleaved1F1B", "ScheduleZBVZeroBubble"}
    ours = [(r.settings["method"], r.settings["microbatches"]) for r in rows if r.settings["ours"]]
    assert ours == [("pipeoptim", 2), ("pipeoptim", 2), ("pipedream_2bw", 2)]
    assert [r.name for r in rows if "in_progress" in r.name] == ["gnmt8 (fused step), 8, pipeoptim in_progress refresh=1 M=2"]
    out = tmp_path / "e.json"
    command = ["bench", "efficiency", "--depth", "2", "--milliseconds", "3", "--method", "1f1b", "--torch-microbatches", "2"]
    assert _run([*command, "--steps", "3", "--repeats", "1", "--delay", "100", "--bandwidth", "10", "--out", str(out)]) == 0
    late = Record.read(out).rows
    assert {row.settings["delay"] for row in late} == {0.1}
    # A mini-batch needs a message each way, 200 ms; the device is busy for 3 ms of them (more where the machine is slow).
    (alone,) = (row for row in late if row.settings["method"] == ALONE)  # sends nothing
    assert all(row.median < min(0.5, alone.median) for row in late if row is not alone)
    assert len(columns(Record.read(out))[1]) == len(late) == 5
    near = ["--transport", "group", "--method", "pipeoptim", "--microbatches", "2", "--refresh", "1"]
    assert _run([*command, *near, "--steps", "3", "--repeats", "1", "--out", str(out), "--add"]) == 0
    gloo = Record.read(out).rows[len(late) :]  # beside them, and no contender that goes through gloo anyway
    assert all(row.settings["gloo"] and row.name.endswith("through gloo") for row in gloo)
    assert [(row.settings["method"], row.settings.get("refresh")) for row in gloo] == [
        ("1f1b", None),
        ("pipeoptim", None),
        ("pipeoptim", 1),
    ]


def test_compressed_messages_are_small_and_fast_on_a_slow_link(tmp_path: Path) -> None:
    """At 1 Mbit/s a message of 8 x 512 numbers takes 132 ms, as int8 34 ms, and two processes wait for nothing else."""
    out = tmp_path / "t.json"
    command = ["bench", "transfer", "--model", "mlp=8", "--megabits", "1", "--repeats", "1", "--window", "0.1"]
    assert _run([*command, "--out", str(out)]) == 0
    rows = Record.read(out).rows
    assert [row.settings["transfer"] for row in rows] == ["as it is", "bf16", "int8"]
    assert [row.settings["message_bytes"] for row in rows] == [
        HEADER + 8 * 512 * n + scales for n, scales in ((4, 0), (2, 0), (1, 64))
    ]
    assert rows[0].median < 8 / 0.13  # the link is as slow as it was asked to be
    assert rows[2].median > 1.5 * rows[0].median
    assert columns(Record.read(out))[1][2][4].endswith(" (0.26)")
    assert _run(["bench", "transfer", "--model", "mlp"]) == 2


def test_losses_are_compared_seed_by_seed() -> None:
    rows = [ResultRow("a", [2.0, 3.0], {"lr": 0.1, "sent": "as it is", "error_feedback": "none"})]
    rows += [ResultRow("b", [2.1, 3.3], {"lr": 0.1, "sent": "int8", "error_feedback": "both"})]
    lines = columns(record(*rows, benchmark="transfer loss"))[1]
    assert lines[0] == ["0.1", "as it is", "none", "2.5000", "", "", ""]
    assert lines[1] == ["0.1", "int8", "both", "2.7000", "+0.2000", "0.1000", "+0.1000 +0.3000"]


def test_what_moved_is_what_noise_cannot_explain() -> None:
    old = record(
        ResultRow("same", [1.0, 1.1, 0.9]),
        ResultRow("up", [1.0, 1.1, 0.9]),
        ResultRow("overlaps", [1.0, 1.1, 0.9]),
        ResultRow("gone", [1.0]),
    )
    new = record(
        ResultRow("same", [1.05, 0.95, 1.0]), ResultRow("up", [2.0, 2.1, 1.9]), ResultRow("overlaps", [1.2, 1.3, 1.05])
    )
    found = {change.name: change for change in compare(old, new)}
    assert [name for name, change in found.items() if change.moved] == ["up"]
    assert found["up"].ratio == pytest.approx(2.0)
    assert found["up"].low <= 2.0 <= found["up"].high
    with pytest.raises(ConfigError, match="no row in common"):
        compare(old, record(ResultRow("other", [1.0])))
    with pytest.raises(ConfigError, match="one file is of"):
        compare(old, record(ResultRow("same", [1.0]), benchmark="memory"))


def test_compare_command_and_bad_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = record(ResultRow("x", [1.0, 1.01])).write(tmp_path / "a.json")
    b = record(ResultRow("x", [3.0, 3.01])).write(tmp_path / "b.json")
    assert _run(["bench", "compare", str(a), str(b)]) == 0
    assert "moved  2.99" in capsys.readouterr().out
    (tmp_path / "c.json").write_text(json.dumps([1]))
    for bad in ("c.json", "missing.json"):
        assert _run(["bench", "compare", str(a), str(tmp_path / bad)]) == 2
        assert "is not a result file" in capsys.readouterr().err


WRONG = {
    "throughput --method none": "unknown method 'none'",
    "throughput --window nan": "window is nan, must be above 0",
    "throughput --batch 8 --batch 0": "batch is 0, must be at least 1",
    "throughput --refresh 0": "refresh is 0, must be at least 1",
    "throughput --microbatches 0": "microbatches is 0, must be at least 1",
    "throughput --batch 8 --torch-microbatches 3": "torch_microbatches is 3, which does not divide a mini-batch of 8",
    "efficiency --depth 0": "depth is 0, must be at least 1",
    "efficiency --torch-microbatches 0": "torch_microbatches is 0, must be at least 1",
    "efficiency --torch-microbatches 5": "torch_microbatches is 5, which does not divide",
    "efficiency --microbatches -1": "microbatches is -1, must be at least 1",
    "efficiency --milliseconds inf": "milliseconds is inf, must be above 0",
    "efficiency --jitter -1": "jitter is -1, must be at least 0",
    "efficiency --method pipedream_2bw --depth 4": "needs at least as many micro-batches as stages",
    "transfer --method none": "unknown method 'none'",
    "transfer --megabits 0": "megabits is 0, must be above 0",
    "scaling --updates 7": "must be a multiple of 10",
    "scaling --method none": "unknown method 'none'",
    "memory --depth 0": "depth is 0, must be at least 1",
    "predict --weights nan": "weights is nan, must be at least 1e+06",
    "predict --threads 0": "threads is 0, must be at least 1",
}


@pytest.mark.parametrize("command", WRONG)
def test_an_impossible_measurement_is_refused_before_any_process_starts(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("subprocess.Popen", None)
    assert _run(["bench", *command.split()]) == 2
    assert WRONG[command] in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_best_m_is_chosen_and_goals_say_by_how_much(tmp_path: Path) -> None:
    rows = [entry("pipeoptim", 1, 140.0), entry("pipeoptim", 2, 130.0), entry("naive", 1, 150.0)]
    rows += [entry("ScheduleGPipe", m, value, ours=False) for m, value in ((2, 100.0), (4, 90.0))]
    written = record(*rows)
    lines = columns(written)[1]
    assert [(line[0], line[1], line[-1]) for line in lines] == [
        ("naive", "1", "1.50"),
        ("pipeoptim", "1", "1.40"),
        ("ScheduleGPipe", "2", "1.00"),
    ]
    written.write(tmp_path / "throughput.json")
    (goal,) = goals(tmp_path)
    assert goal == Goal("mlp, mini-batch 64: pipeoptim over the best of torch", 1.4, least=1.5)
    assert "**0.100 short of the goal**" in markdown(tmp_path)
    assert Goal("x", 2.1, most=2.02).missing == pytest.approx(0.08)
    assert Goal("x", 2.0, most=2.02).missing == 0
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- table: throughput.json model=mlp batch=64 -->\n<!-- end of table -->\n<!-- goals: . -->\n<!-- end of goals -->\n"
    )
    text = render_document(page, tmp_path)
    assert "| pipeoptim | 1 | 140 |" in text
    assert "Missed: 1 of 1 goals that were measured." in text


def test_efficiency_is_held_against_plain_loops_of_the_same_conditions_and_against_the_program(tmp_path: Path) -> None:
    base = {"depth": 4, "milliseconds": 10.0, "microbatches": 1, "uneven": 0.0, "jitter": 0.0, "bandwidth": 0.0, "gloo": False}
    rows = []
    for delay, slack, loops, ours in (
        (0.0, "", 0.95, 0.9405),
        (0.003, "1", 0.9, 0.882),
        (0.01, "2", 0.8, 0.7),
        (0.02, "1", 0.9, 0.1),
    ):
        s = {**base, "delay": delay}
        rows += [ResultRow("", [loops], {**s, "method": ALONE, "ours": True})]
        rows += [ResultRow("", [ours], {**s, "method": "pipeoptim", "ours": True, **({"slack": slack} if slack else {})})]
    own = {
        **base,
        "depth": 8,
        "delay": 0.003,
        "ours": True,
        "slack": "1",
    }  # another run has replaced the row of its plain loops
    rows += [
        ResultRow("", [0.98], {**own, "method": ALONE}),
        ResultRow("", [0.882], {**own, "method": "pipeoptim", "plain loops": 0.9}),
    ]
    jitter = {**base, "jitter": 0.3, "delay": 0.0, "method": "pipeoptim", "ours": True, "slack": "1", "ideal": 0.9}
    jitter |= {"ideal with own work": 0.875}
    Record("efficiency", "", {}, [*rows, ResultRow("", [0.891], jitter)]).write(tmp_path / "efficiency.json")
    refreshed = [ResultRow(f"r={r}", [0.9 + r / 100], {"depth": 8, "refresh": r}) for r in (1, 2)]
    Record("refresh", "", {}, refreshed).write(tmp_path / "refresh.json")
    listed = goals(tmp_path)
    assert [goal.beside for goal in listed if goal.least == 0.98] == [
        "what the program allows: 0.900, and with the work of plain loops between the waits: 0.875"
    ]
    found = {goal.what: (round(goal.value, 6), goal.least) for goal in listed}
    assert found == {
        "4 stages of 10 ms: pipeoptim over plain loops": (0.99, 0.99),
        "4 stages of 10 ms, delay 3 ms: pipeoptim over plain loops": (0.98, 0.97),
        "4 stages of 10 ms, delay 10 ms: pipeoptim over plain loops": (0.875, 0.97),
        "8 stages of 10 ms, delay 3 ms: pipeoptim over plain loops": (0.98, 0.97),
        "4 stages of 10 ms, jitter 0.3: pipeoptim over what its program allows with the same draws": (0.99, 0.98),
        "r=1: throughput over one prediction per update": (0.91, 0.95),
    }
    # What the program allows is the model's figure, but for the draws and the length of the windows.
    model = efficiency(Program("async_1f1b", 4, slack=1), 0.0, 0.3)
    (alone,) = ideal_windows(Program("async_1f1b", 4, slack=1), 0.3, 9, 600, 1)
    assert alone == pytest.approx(model, abs=0.03)
    # At worst all work between the waits is on the path that decides, at best it costs a stage no more than its own time.
    (worked,) = ideal_windows(Program("async_1f1b", 4, slack=1), 0.3, 9, 600, 1, own_work=0.1)
    mean = math.exp(0.3**2 / 2)
    assert alone / (1 + 0.1 / mean * alone) - 0.005 < worked < 1 / (1 + 0.1 / mean)


@pytest.mark.parametrize("name", ["throughput", "efficiency", "slack", "transfer", "memory", "predict"])
@pytest.mark.parametrize("change", [{"machine": {}}, {"benchmark": "scaling"}])
def test_figures_that_cannot_be_added_are_not_measured(
    name: str, change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(f"pipeoptim.bench.{'slack_model' if name == 'slack' else name}")
    monkeypatch.setattr(module, "measure", lambda *_, **__: pytest.fail("measured first"))
    old = replace(Record(name, "", {"weights": 100e6}, []), **change)
    assert _run(["bench", name, "--add", "--out", str(old.write(tmp_path / "old.json"))]) == 2
    assert "the figures in that file are of another machine, version or" in capsys.readouterr().err


def test_a_file_of_this_machine_goes_on_and_one_of_another_does_not(tmp_path: Path) -> None:
    path = tmp_path / "storm.json"
    for samples in ([1.0], [1.0, 2.0]):
        found = Record.continued(path, "s", {"stages": 2})
        found.row_or_new("killed").samples.append(float(len(samples)))
        found.write(path)
        assert (found.benchmark, found.unit, found.settings) == ("storm", "s", {"stages": 2})
        assert Record.continued(path, "s", {}).rows == [ResultRow("killed", samples)]
    replace(found, machine={**found.machine, "torch": "1.0"}).write(path)
    assert Record.continued(path, "s", {}).rows == []


def test_files_are_merged_by_row() -> None:
    old = record(entry("naive", 1, 1.0), entry("pipeoptim", 1, 1.0))
    both = merged(old, record(entry("pipeoptim", 1, 2.0)))
    assert [(row.settings["method"], row.median) for row in both.rows] == [("naive", 1.0), ("pipeoptim", 2.0)]
    with pytest.raises(ConfigError, match="another machine"):
        merged(old, record(benchmark="memory"))


def test_the_goals_of_two_sites_take_the_best_of_torch_over_the_same_link(tmp_path: Path) -> None:
    figures = {
        ("Schedule1F1B M=4", "20 ms, 100 Mbit/s", "0", ""): 0.1,
        ("ScheduleGPipe M=4", "20 ms, 100 Mbit/s", "0", ""): 0.2,
        ("Schedule1F1B M=4", "no delay, no limit", "0", ""): 0.5,
        ("pipeoptim M=1", "20 ms, 100 Mbit/s", "0", ""): 0.5,
        ("pipeoptim M=1 slack 0,2,0", "20 ms, 100 Mbit/s", "0,2,0", ""): 0.9,
        ("pipeoptim M=1 slack 0,2,0 int8", "20 ms, 100 Mbit/s", "0,2,0", "int8"): 0.95,
        ("pipeoptim M=1 slack 0,2,0", "no delay, no limit", "0,2,0", ""): 1.0,
        ("plain loops M=1", "20 ms, 100 Mbit/s", "0", ""): 1.0,
    }
    rows = [
        ResultRow(f"{contender}, {link}", [value], {"contender": contender, "link": link, "slack": slack, "compress": compress})
        for (contender, link, slack, compress), value in figures.items()
    ]
    Record("two sites", "efficiency", {}, rows).write(tmp_path / "two_sites.json")
    beside_torch, beside_itself = goals(tmp_path)
    assert (beside_torch.value, beside_torch.missing) == (pytest.approx(4.5), 0)
    assert (beside_itself.value, beside_itself.missing) == (pytest.approx(0.9), pytest.approx(0.05))
