"""``pipeoptim plan`` and the forecast behind it."""

from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pipeoptim as po
from pipeoptim.cli.app import _run
from pipeoptim.partitioning.forecast import seconds_per_minibatch
from pipeoptim.schedule import Program


@given(stages=st.lists(st.floats(0.5, 5), min_size=1, max_size=6), m=st.integers(1, 4))
def test_an_asynchronous_pipeline_is_as_fast_as_its_slowest_stage_and_a_flush_is_slower(stages, m):
    fast = seconds_per_minibatch(Program("async_1f1b", len(stages), m), stages)
    assert fast >= max(stages) - 1e-9
    assert seconds_per_minibatch(Program("1f1b", len(stages), m), stages) >= fast - 1e-9
    even = [max(stages)] * len(stages)
    assert seconds_per_minibatch(Program("async_1f1b", len(stages), m), even) == pytest.approx(max(stages))
    one_by_one = seconds_per_minibatch(Program("gpipe", len(stages), 1), stages)
    assert one_by_one == pytest.approx(sum(stages))


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
    """The command line in this process, in an empty folder: exit code, output, errors."""
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = _run(["plan", *arguments])
        return code, *capsys.readouterr()

    return run


def test_plan_shows_the_cut_and_every_method(command, tmp_path):
    arguments = ["--recipe", "digits", "--stages", "3", "--microbatches", "2", "--pin", "2", "--svg", str(tmp_path / "a.svg")]
    code, out, err = command(*arguments)
    assert code == 0, err
    assert "stage 2" in out
    assert "2 blocks: 0 " in out  # the pin
    for name in po.METHODS:
        assert name in out
    assert "set microbatches to 3 or more" in out
    assert (tmp_path / "a.svg").read_text().startswith("<svg")
    code, _, err = command(*arguments)
    assert code == 2 and "choose another file for --svg" in err


OWN = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 50)

    def forward(self, ids, scale=1.0):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x).relu() * scale
        return self.head(x)

def make():
    return Net(), (torch.zeros(4, 3, dtype=torch.long),), {"scale": torch.ones(())}

def wrong():
    return Net()
"""


def test_plan_of_a_model_of_ones_own(command, tmp_path):
    (tmp_path / "my_own_net.py").write_text(OWN)
    own = ("--model", "my_own_net:make")
    code, out, err = command(*own, "--stages", "3", "--pin", "layers.1", "--picture", "stages.svg", "--blocks")
    assert code == 0, err
    head, *lines = out.splitlines()[:6]
    assert head.split() == ["block", "F", "ms", "B", "ms", "output", "kept", "for", "B", "weights"]
    assert lines[0].split()[0] == "layers.0" and lines[0].endswith("1.8 KiB")  # (50 * 8 + 8 * 8 + 8) * 4 bytes
    assert lines[4].startswith("after layers.3")
    assert "1 block:  layers.0, sends" in out
    tree = ElementTree.parse(tmp_path / "stages.svg")
    titles = [e.text for e in tree.iter() if e.tag.endswith("title")]
    assert [t.split(":")[0] for t in titles] == ["layers.0", "layers.1", "layers.2", "layers.3", "after layers.3"]
    code, out, _ = command("--model", "my_own_net:make", "--devices", "3", "--bandwidth", "10", "--memory", "1")
    assert code == 0
    assert "on 3 devices" in out or "stage 1" in out
    code, _, err = command("--model", "my_own_net:wrong", "--stages", "2")
    assert code == 2 and "must return (model, args)" in err
    code, _, err = command("--model", "my_own_net:make")
    assert code == 2 and "say how many stages" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--stages", "40"], "use 1 .. 6"),
        (["--recipe", "charss"], "chars"),
        (["--method", "pipeoptimm"], "did you mean 'pipeoptim'"),
        (["--memory", "0.000001"], "must be 4 positive numbers"),
        (["--devices", "4"], "without bandwidth"),
        (["--devices", "4", "--bandwidth", "1", "--speed", "2"], "taken to be equal"),
        (["--how", "magic"], "must be one of auto, blocks"),
        (["--pin", "block9"], "which is not a block"),
        (["--device", "nowhere"], "cannot be used here"),
        (["--stages", "0"], "stages is 0, must be an integer"),
        (["--microbatches", "0"], "microbatches is 0"),
        (["--bandwidth", "0"], "bandwidth is 0.0"),
        (["--memory", "nan"], "memory is nan"),
        (["--speed", "inf", "--speed", "1", "--stages", "2"], "must be 2 positive numbers"),
        (["--picture", "no/such/folder.svg"], "the folder no/such does not exist"),
        (["--model", "a:b", "--recipe", "digits"], "leave one out"),
        (["--how", "blocks", "--layers", "4"], "leave one of them out"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(command, arguments, words):
    code, _, err = command(*arguments)
    assert code == 2
    assert words in err
    assert err.count("\n") == 1
