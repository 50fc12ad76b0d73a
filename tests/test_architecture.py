"""docs/architecture.md and CONTRIBUTING.md name files that exist, and the former tells truly which a micro-batch passes."""

import json
import re
from pathlib import Path

import pytest
import torch

import path_worker
import pipeoptim as po
import stage_processes
from pipeoptim.kernels.library import available

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/architecture.md").read_text()
FILE = re.compile(r"`((?:[a-z_0-9]+/)+[a-z_0-9]+\.(?:py|c))`")
AT_MOST = 6


def told():
    """The numbered files of the section on the path, and the kernel that they lead to."""
    section = re.search(r"## \w+ files from `step` to the kernel\n(.*?)\n## ", PAGE, re.DOTALL)[1]
    *path, rest = re.split(r"\n\n(?=Then )|\n(?=\d\. )", section.strip())
    return [FILE.search(item)[1] for item in path], FILE.search(rest)[1]


@pytest.mark.parametrize(("page", "at_least"), [("docs/architecture.md", 15), ("CONTRIBUTING.md", 10)])
def test_every_file_that_a_page_names_exists(page, at_least):
    named = set(FILE.findall((ROOT / page).read_text()))
    assert len(named) >= at_least
    assert not {name for name in named if not (ROOT / "src/pipeoptim" / name).exists() and not (ROOT / name).exists()}


needs_kernels = pytest.mark.skipif(not available(), reason="no kernels here")


@needs_kernels
def test_a_step_of_a_schedule_passes_the_files_that_the_page_tells():
    path, kernel = told()
    assert len(path) <= AT_MOST
    for output in stage_processes.run(ROOT / "tests/engine/path_worker.py", 2):
        found = json.loads(output)
        assert found == [[*path, kernel]]


@needs_kernels
def test_a_step_of_an_emulator_passes_the_same_files_behind_its_own():
    path, kernel = told()
    stages = [torch.nn.Linear(4, 4) for _ in range(3)]
    pipe = po.Emulator(stages, torch.optim.AdamW, torch.nn.functional.mse_loss)
    x = torch.ones(4, 4)
    for _ in range(6):
        pipe.step(x, target=x)
    found = path_worker.paths_of(lambda: pipe.step(x, target=x))
    assert found == [["engine/emulator.py", *path, kernel]] * 3


def test_the_picture_shows_these_files():
    path, kernel = told()
    picture = (ROOT / "docs/architecture.svg").read_text()
    shown = re.findall(r">(\w[\w/]*\.py)</text>", picture)
    assert [name for name in shown if name in path] == path
    assert kernel in shown
    assert all((ROOT / "src/pipeoptim" / name).exists() for name in shown)
