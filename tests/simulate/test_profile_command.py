"""``pipeoptim profile``: what is counted is exact, what is measured is plausible, and bad input writes nothing."""

import json

import pytest
import torch
from torch import nn

from pipeoptim.bench import memory, model_profile
from pipeoptim.bench.computed import ComputedRun, counted_profile
from pipeoptim.bench.link_profile import LinkMeasurement, measure_link
from pipeoptim.bench.measured_model import MeasuredModel
from pipeoptim.bench.model_profile import measure_profile, measured_bytes
from pipeoptim.bench.models import Workload
from pipeoptim.cli.app import _run
from pipeoptim.methods import get_method
from pipeoptim.simulate import Scenario, read_profile, simulate

LINK = LinkMeasurement(1e-4, None, 1e-9, 4e-4, 1e-4)

MODEL = """
import torch
def net():
    return torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(3))), (torch.ones(8, 16),)
"""


def test_bytes_are_exact_and_seconds_are_those_of_training(monkeypatch, tmp_path):
    monkeypatch.setattr(model_profile, "measure_link", lambda repeats: LINK)
    torch.manual_seed(0)
    blocks = [torch.nn.Linear(64, 64), torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.Tanh()), torch.nn.Linear(512, 8)]
    before = [p.detach().clone() for block in blocks for p in block.parameters()]
    x, y = torch.randn(64, 64), torch.randn(64, 8)
    work = MeasuredModel(
        "net", torch.nn.Sequential(*blocks), (x,), 64, lambda p: torch.optim.AdamW(p), torch.nn.functional.mse_loss, y
    )
    found = measure_profile(work, (1, 4), repeats=5)
    assert all(torch.equal(a, b) for a, b in zip(before, (p for block in blocks for p in block.parameters()), strict=True))
    assert (found.rows, found.batch_rows, found.synthetic, found.optimizer.state_bytes) == ((16, 64), 64, False, 2.0)
    assert [block.output_bytes for block in found.blocks] == [(16 * n * 4, 64 * n * 4) for n in (64, 512, 8)]
    assert [block.weight_bytes for block in found.blocks] == [4 * n for n in (64 * 65, 65 * 512, 513 * 8)]
    assert found.blocks[1].forward[1] > found.blocks[1].forward[0] > 0
    assert (found.link.latency, found.link.handling) == (1e-4, 1e-9)
    assert found.action["F"] > 0
    assert read_profile(found.write(tmp_path / "p.json")) == found
    method = get_method("pipeoptim")
    run = simulate(Scenario(found, (2, 1), method, method.program(2, 4), 20))
    seconds = sum(block.forward[0] + block.backward[0] for block in found.blocks[:2])
    assert 0 < run.throughput.median < 1 / (4 * seconds), "the slower stage, with what the engine adds"
    assert run.stages[0].memory == pytest.approx(
        sum(b.weight_bytes for b in found.blocks[:2]) * (2 + 1 + 2)
        + 2 * (sum(b.saved_bytes[0] for b in found.blocks[:2]) - found.blocks[1].shared_bytes[0])
    )
    # The second block's input is the first one's output: on one stage it is there once.
    assert [b.shared_bytes[0] for b in found.blocks] == [0, 16 * 64 * 4, 16 * 512 * 4]


def test_the_memory_of_every_stage_is_that_of_the_engine():
    """Weights and activations at the peak, under every method, as the memory benchmark finds them by watching live storages."""
    width = rows = 64
    found = memory.measure([3], None, [1, 0], width, rows)
    stages = [
        torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64), torch.nn.ReLU())
        for _ in range(3)
    ]
    model, profiles = torch.nn.Sequential(*stages), {}
    for m in (1, 3):
        x, y = (torch.randn(rows * m, width) for _ in range(2))
        profiles[m] = measured_bytes(MeasuredModel("net", model, (x,), len(x), sgd, memory._loss, y, how="blocks"), (m,))
    for row in found.rows:
        k, m = row.settings["stage"], row.settings["microbatches"]
        method = get_method(row.settings["method"])
        run = simulate(Scenario(profiles[m], (1, 1, 1), method, method.program(3, m), 8)).stages[k]
        assert run.copies * profiles[m].blocks[k].weight_bytes == row.median, row.name
        assert run.activations == row.settings["activations"], row.name


@pytest.mark.parametrize("m", [1, 2])
def test_stages_of_several_blocks_keep_what_they_share_once(m):
    """A residual block, a view, an activation that saves its output and a loss with a large memory: measured on live storages."""
    run = ComputedRun(f"{__name__}:mixed", 16, "pipeoptim", m, (3, 2))
    stages = run.predict(counted_profile(run.model, run.batch, (m,))).stages
    assert [stage.memory for stage in stages] == run.peaks()


def mixed(batch):
    """Work for the test above."""
    blocks = [
        nn.Linear(8, 32),
        Residual(),
        nn.Sequential(nn.ReLU(), nn.Linear(32, 8)),
        nn.Unflatten(1, (2, 4)),
        nn.Linear(4, 4),
    ]
    return Workload(blocks, torch.randn(batch, 8), torch.randn(batch, 2, 4), nn.functional.mse_loss)


class Residual(nn.Module):
    """Its output is what the next block saves, its input what it saves itself."""

    def forward(self, x):
        return x + torch.tanh(x)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def test_a_model_of_more_blocks_than_repeats_is_profiled(monkeypatch):
    monkeypatch.setattr(model_profile, "measure_link", lambda repeats: LINK)
    x = torch.randn(4, 4)
    work = MeasuredModel("net", nn.Sequential(*(nn.Linear(4, 4) for _ in range(9))), (x,), 4, sgd, nn.functional.mse_loss, x)
    found = measure_profile(work, repeats=5)
    assert found.spread >= 0 and all(block.forward[0] > 0 for block in found.blocks)


def test_messages_between_two_processes_take_time():
    found = measure_link(repeats=1)
    assert 1e-5 < found.per_microbatch + found.per_minibatch < 0.5
    assert found.latency >= 0 <= found.handling < 1e-6
    assert found.bandwidth is None or found.bandwidth > 1e6


def profiled(capsys, *arguments):
    code = _run(["profile", *arguments])
    out = capsys.readouterr()
    return code, out.out, " ".join(out.err.split())


def test_a_model_of_ones_own_and_a_formula(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model_profile, "measure_link", lambda repeats: LINK)
    (tmp_path / "mine.py").write_text(MODEL)
    code, out, _ = profiled(capsys, "--model", "mine.py:net", "--microbatches", "2", "--repeats", "5", "--out", "own.json")
    assert (code, read_profile(tmp_path / "own.json").rows) == (0, (4,))
    assert "mine.py:net: 3 blocks" in out
    (tmp_path / "still.py").write_text(MODEL.replace("(3))), ", "(3))).requires_grad_(False), "))
    code, _, error = profiled(capsys, "--model", "still.py:net", "--out", "still.json")
    assert (code, "returned a model without weights that are trained" in error) == (2, True)
    code, out, _ = profiled(capsys, "--synthetic", "--sizes", "layers=6,rows=8", "--out", "formula.json")
    assert (code, "6 blocks, by formula" in out, json.loads((tmp_path / "formula.json").read_text())["synthetic"]) == (
        0,
        True,
        True,
    )
    assert _run(["simulate", "--profile", "formula.json", "--stages", "3", "--microbatches", "4"]) == 0
    assert "a formula, nothing of it measured" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--out", "nowhere/p.json"), "the folder nowhere does not exist"),
        (("--out", "p.json", "--synthetic"), "sizes say nothing of layers"),
        (("--out", "p.json", "--synthetic", "--tiny"), "leave the options that name or measure a model out"),
        (("--out", "p.json", "--synthetic", "--device", "cuda"), "leave the options that name or measure a model out"),
        (("--out", "p.json", "--repeats", "100000000000"), "repeats is 100000000000, must be at least 5 and at most 10,000"),
        (("--out", "p.json", "--sizes", "width=8"), "belongs to --synthetic"),
        (("--out", "p.json", "--repeats", "1"), "repeats is 1, must be at least 5"),
        (("--out", "p.json", "--model", "m:f", "--tiny"), "returns model and mini-batch by itself"),
        (
            ("--out", "p.json", "--recipe", "digits", "--tiny", "--microbatches", "7"),
            "microbatches is 7, must divide the mini-batch of 32",
        ),
    ],
)
def test_what_cannot_be_profiled_is_refused_in_a_sentence(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, error = profiled(capsys, *arguments)
    assert (code, out) == (2, "")
    assert words in error
    assert list(tmp_path.iterdir()) == []
