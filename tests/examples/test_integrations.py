"""The examples of docs/integrations.md: each runs on two processes, learns, is short, and leaves what it says."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pipeoptim as po

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests/trace"))
from chrome_format import check  # noqa: E402

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def torchrun(name, folder, argument=".", **environment):
    """Output and losses of an example on two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "examples" / name), str(folder / argument)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, [float(loss) for loss in re.findall(r"loss ([0-9.]+)", done.stdout)]


def scalars(folder):
    """TensorBoard's figures by name: [(step, value)]."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for file in folder.rglob("events.out.tfevents.*"):
        board = EventAccumulator(str(file))
        board.Reload()
        for name in board.Tags()["scalars"]:
            found.setdefault(name, []).extend((e.step, e.value) for e in board.Scalars(name))
    return found


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_under_80_lines(path):
    assert len(path.read_text().splitlines()) < 80


def test_the_documentation_names_every_example():
    pages = "".join(page.read_text() for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    assert [path.name for path in EXAMPLES if f"examples/{path.name}" not in pages] == []


def test_the_lines_of_the_documentation_are_those_of_the_scripts():
    sections = (ROOT / "docs/integrations.md").read_text().split("\n## ")[1:]
    checked = 0
    for section in sections:
        scripts = "".join((ROOT / name).read_text() for name in re.findall(r"\.\./(examples/\w+\.py)", section))
        for block in re.findall(r"```py\n(.*?)```", section, re.DOTALL):
            for line in block.splitlines():
                assert line.strip() in scripts, f"{line!r} is in no script of its section"
                checked += 1
    assert checked >= 15


def test_hugging_faces_stages_in_a_row_are_the_model():
    """The loss of the example's stages is the one that Transformers computes itself."""
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location("causal_lm", ROOT / "examples/huggingface_causal_lm.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    model = example.build_model().eval()
    ids = next(example.batches(5, 1))
    expected = model(input_ids=ids, labels=ids).loss
    for depth in (2, 4):
        stages = example.cut(model, depth)
        assert len(stages) == depth
        pipe = po.Emulator(stages, lambda p: torch.optim.SGD(p, lr=0.1), example.loss_fn)
        torch.testing.assert_close(pipe.eval_step(ids, target=ids), expected.detach())


def test_titan_style(tmp_path):
    out, (loss,) = torchrun("titan_style.py", tmp_path, STEPS="50")
    assert loss < 1.0  # random guessing: log 16 = 2.77
    found = scalars(tmp_path)
    assert [step for step, _ in found["train/loss"]] == list(range(1, 51))
    assert found["train/lr"][0][1] > 10 * found["train/lr"][-1][1]
    rows = check(json.loads((tmp_path / "trace/trace.json").read_text()))
    forwards = [e["name"] for e in next(v for k, v in rows.items() if k[1] == "stage 0") if e["name"][0] == "F"]
    assert forwards == [f"F{i}" for i in range(10, 50)]  # 20 mini-batches of 2 micro-batches, the first 5 left out
    assert "ideal idle" in out


def test_fabric_loop(tmp_path):
    pytest.importorskip("lightning_fabric")
    pytest.importorskip("torchdata")
    _, losses = torchrun("fabric_loop.py", tmp_path)
    assert len(losses) == 5 and losses[:3] == sorted(losses[:3], reverse=True) and losses[2] < 0.8
    assert losses[1:3] == losses[3:], "the rest of epoch 2, and epoch 3, from what was saved in the middle"


def test_accelerate_loop(tmp_path):
    pytest.importorskip("accelerate")
    _, losses = torchrun("accelerate_loop.py", tmp_path, EPOCHS="3")
    assert len(losses) == 3 and losses == sorted(losses, reverse=True) and losses[-1] < 1.1
    found = scalars(tmp_path)
    assert [value for _, value in found["validation/loss"]] == pytest.approx(losses, abs=1e-4)
    states = [torch.load(tmp_path / f"stage-{k}.pt", weights_only=True) for k in range(2)]
    assert [state["version"] for state in states] == [120, 120]
