"""Optimizers of other packages: predicted without a rule, trained in a pipeline. Skipped where a package is not installed.

``pip install 'pipeoptim[third-party]'`` installs them.
"""

from __future__ import annotations

import copy
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import pipeoptim as po
from pipeoptim.rules import find_rule
from pipeoptim.testing import check_rule

ROOT = Path(__file__).parents[2]


def published(module: str, name: str, **options: Any) -> Callable[[Any], Optimizer]:
    """Makes the optimizer ``module.name``; skips the test where the package is not there."""

    def make(parameters: Any) -> Optimizer:
        cls = getattr(pytest.importorskip(module), name)
        optimizer: Optimizer = cls(parameters, **options)
        if hasattr(optimizer, "train"):
            optimizer.train()  # schedule-free: the weights are those that gradients are taken at
        return optimizer

    return make


OPTIMIZERS = {
    "schedule-free AdamW": published("schedulefree", "AdamWScheduleFree", lr=0.02, warmup_steps=3),
    "schedule-free SGD": published("schedulefree", "SGDScheduleFree", lr=1.0),
    "Lion": published("lion_pytorch", "Lion", lr=0.01, weight_decay=0.1),
    "SOAP": published("pytorch_optimizer", "SOAP", lr=0.02, precondition_frequency=2),
    "Shampoo": published("pytorch_optimizer", "Shampoo", lr=0.05, preconditioning_compute_steps=1),
}


def stages(depth: int = 4) -> list[nn.Module]:
    torch.manual_seed(1)
    return [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(depth)]


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 6, generator=generator)
    return x, torch.tanh(x.flip(1))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_contract_holds(name: str) -> None:
    cls = type(OPTIMIZERS[name]([nn.Parameter(torch.zeros(2, 2))]))
    report = check_rule(cls, make=OPTIMIZERS[name])
    assert not report.has_rule
    assert report.kinds == ("displacement",)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_forward_of_a_pipeline_sees_the_last_displacement_continued(name: str) -> None:
    """The oracle keeps all weights: ``W_t + s (W_t - W_{t-1})`` with the gap of each forward."""
    modules, (x, y) = stages(), batch()
    assert find_rule(OPTIMIZERS[name](modules[0].parameters())) is None
    seen: list[list[torch.Tensor]] = []
    modules[0].register_forward_pre_hook(lambda mod, args: seen.append([p.detach().clone() for p in mod.parameters()]))
    history = [[p.detach().clone() for p in modules[0].parameters()]]

    def updated(k: int, version: int) -> None:
        if k == 0:
            history.append([p.detach().clone() for p in modules[0].parameters()])

    pipe = po.Emulator(modules, OPTIMIZERS[name], nn.functional.mse_loss, on_update=updated)
    for _ in range(12):
        pipe.step(x, target=y)
    for n, weights in enumerate(seen):
        t = max(0, n - 3)
        now, before = history[t], history[max(0, t - 1)]
        for w, a, b in zip(weights, now, before, strict=True):
            torch.testing.assert_close(w, a + pipe.program.gap(0, n) * (a - b), rtol=1e-5, atol=1e-5)
    assert pipe.weight_copies(0) == 2
    assert pipe.weight_bytes(0) <= 2 * sum(p.numel() * 4 for p in modules[0].parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_pipeline_learns_and_resumes_exactly(name: str) -> None:
    def build() -> tuple[list[nn.Module], po.Emulator]:
        modules = stages()
        return modules, po.Emulator(modules, OPTIMIZERS[name], nn.functional.mse_loss)

    (modules, pipe), (x, y) = build(), batch()
    losses = [float(pipe.step(x, target=y)) for _ in range(40)]
    assert losses[-1] < 0.8 * losses[0]
    pipe.drain()
    saved = copy.deepcopy([pipe.stage_state_dict(k) for k in range(4)])
    resumed, again = build()
    for k in range(4):
        again.load_stage_state_dict(k, saved[k])
    for each in (pipe, again):
        for _ in range(8):
            each.step(x, target=y)
        each.drain()
    pairs = zip(nn.Sequential(*modules).parameters(), nn.Sequential(*resumed).parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_extra_lists_the_packages() -> None:
    """What the cases import is what the extra installs, and ``make test`` installs it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = {line.split(">")[0].replace("-", "_") for line in project["optional-dependencies"]["third-party"]}
    assert extra == {"schedulefree", "lion_pytorch", "pytorch_optimizer"}
    installed = re.search(r"'\.\[(.*)\]'", (ROOT / "Makefile").read_text())
    assert installed is not None and {"test", "third-party"} <= set(installed[1].split(","))
