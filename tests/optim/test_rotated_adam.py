"""Rotated Adam against its formulas in numpy, against published SOAP, and against torch's AdamW where nothing is rotated."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pipeoptim as po
from pipeoptim.optim import RotatedAdam, linear_weights
from pipeoptim.optim.eigenbasis import refreshed_basis

mse = nn.functional.mse_loss


def gradients(count: int, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Gradients of one direction plus noise, so that the eigenvalues of their averages differ."""
    g = torch.Generator().manual_seed(seed)
    common = torch.randn(*shape, generator=g, dtype=torch.float64)
    return [(common + torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype) for _ in range(count)]


def stepped(weight: torch.Tensor, grads: list[torch.Tensor], **options: Any) -> torch.Tensor:
    p = nn.Parameter(weight.clone())
    optimizer = RotatedAdam([p], **options)
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
    return p.detach()


class Basis:
    """One side, from the formulas: the average of G G^T, its eigenvectors, and one power step and QR per refresh."""

    def __init__(self, used: bool) -> None:
        self.used, self.average, self.vectors = used, None, None

    def turn(self, product: np.ndarray, b2: float, refresh: bool) -> np.ndarray | None:
        """Takes in G G^T; the new order of the columns where they were refreshed."""
        if not self.used:
            return None
        if self.average is None:
            self.average = (1 - b2) * product
            self.vectors = np.linalg.eigh(self.average)[1][:, ::-1]
            return None
        self.average = b2 * self.average + (1 - b2) * product
        if not refresh:
            return None
        estimates = np.diag(self.vectors.T @ self.average @ self.vectors)
        order = np.argsort(-estimates, kind="stable")
        self.vectors = np.linalg.qr(self.average @ self.vectors[:, order])[0]
        return order

    def matrix(self, size: int) -> np.ndarray:
        return self.vectors if self.used else np.eye(size)


def by_formula(w, grads, lr, b1, b2, eps, wd, every, rows, columns):
    left, right = Basis(rows), Basis(columns)
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(grads, start=1):
        order = left.turn(g @ g.T, b2, t % every == 0)
        v = v if order is None else v[order]
        order = right.turn(g.T @ g, b2, t % every == 0)
        v = v if order is None else v[:, order]
        u, q = left.matrix(w.shape[0]), right.matrix(w.shape[1])
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * (u.T @ g @ q) ** 2
        step = (u.T @ m @ q / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        w = w * (1 - lr * wd) - lr * u @ step @ q.T
    return w


@pytest.mark.parametrize(
    ("shape", "options", "sides"),
    [
        # Sides that differ by 1 at most: of a null space of two dimensions any basis would be right.
        # The first g is diagonal; its other elements are rounding errors, which a larger eps keeps small.
        ((4, 3), {"eps": 1e-4}, (True, True)),
        ((4, 4), {"eps": 1e-4, "refresh_every": 3, "betas": (0.5, 0.7), "weight_decay": 0.0}, (True, True)),
        ((5, 3), {"sides": "unilateral", "refresh_every": 2}, (False, True)),
        ((4, 4), {"sides": "unilateral", "eps": 1e-2}, (True, False)),
        ((5, 3), {"max_dim": 4, "refresh_every": 1}, (False, True)),
    ],
)
def test_equals_the_formulas(shape, options, sides):
    weight, grads = torch.randn(*shape, dtype=torch.float64), gradients(25, *shape)
    got = stepped(weight, grads, lr=0.05, **options)
    named = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "refresh_every": 10, **options}
    numbers = (*named["betas"], named["eps"], named["weight_decay"], named["refresh_every"])
    expected = by_formula(weight.numpy(), [g.numpy() for g in grads], 0.05, *numbers, *sides)
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-9)


def test_turning_all_gradients_turns_the_path():
    """What Adam lacks: with P, Q orthogonal, the gradients P G Q^T lead from P W Q^T to P (where G leads from W) Q^T."""
    weight, grads = torch.randn(4, 5, dtype=torch.float64), gradients(15, 4, 5)
    p, q = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q for n in (4, 5))
    there = stepped(p @ weight @ q.T, [p @ g @ q.T for g in grads], lr=0.05, refresh_every=4)
    torch.testing.assert_close(there, p @ stepped(weight, grads, lr=0.05, refresh_every=4) @ q.T, rtol=0, atol=1e-6)
    plain = {"lr": 0.05, "rotate": False}
    apart = stepped(p @ weight @ q.T, [p @ g @ q.T for g in grads], **plain) - p @ stepped(weight, grads, **plain) @ q.T
    assert apart.abs().max() > 0.05


def test_between_refreshes_it_steps_as_published_soap():
    """SOAP takes its first gradient for the bases alone, so both start from its state; its eps stands elsewhere and is made tiny."""
    published = pytest.importorskip("pytorch_optimizer").SOAP
    grads = gradients(8, 5, 3)
    weight = torch.randn(5, 3, dtype=torch.float64)
    theirs, ours = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
    # It decays after its step, and RotatedAdam before, as torch does: without decay.
    betas, common = (0.9, 0.95), {"lr": 0.05, "weight_decay": 0.0, "eps": 1e-30}
    soap = published([theirs], betas=betas, precondition_frequency=1000, **common)
    theirs.grad = grads[0].clone()
    soap.step()
    optimizer = RotatedAdam([ours], betas=betas, refresh_every=1000, **common)
    state = soap.state[theirs]
    optimizer.state[ours] = {
        "step": torch.tensor(0.0),
        "exp_avg": torch.zeros_like(weight),
        "exp_avg_sq": torch.zeros_like(weight),
        **{f"{side}_average": average.clone() for side, average in zip(("row", "column"), state["GG"], strict=True)},
        **{f"{side}_basis": basis.clone() for side, basis in zip(("row", "column"), state["Q"], strict=True)},
    }
    for grad in grads[1:]:
        theirs.grad, ours.grad = grad.clone(), grad.clone()
        soap.step()
        optimizer.step()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert (ours - weight).abs().max() > 0.1


def test_a_refresh_is_that_of_published_soap():
    published = pytest.importorskip("pytorch_optimizer").SOAP
    rows, columns = (torch.stack([g @ g.T for g in gradients(9, n, n, seed=n)]).mean(0) for n in (5, 3))
    bases = [torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q for n in (5, 3)]
    second = torch.rand(5, 3, dtype=torch.float64)
    state = {"exp_avg_sq": second.clone(), "GG": [rows, columns], "Q": bases}
    found = published([nn.Parameter(second.clone())]).get_orthogonal_matrix_qr(state)
    (left, by_row), (right, by_column) = refreshed_basis(rows, bases[0]), refreshed_basis(columns, bases[1])
    torch.testing.assert_close(left, found[0], rtol=0, atol=1e-5)  # theirs is found in float32
    torch.testing.assert_close(right, found[1], rtol=0, atol=1e-5)
    assert torch.equal(second[by_row][:, by_column], state["exp_avg_sq"])


def test_what_is_not_rotated_moves_as_by_adamw_bit_for_bit():
    torch.manual_seed(0)
    shapes = [(7,), (4, 3), (2, 3, 2), (6, 6)]
    ours, theirs = ([nn.Parameter(w.clone()) for w in w0] for w0 in [[torch.randn(s) for s in shapes]] * 2)
    optimizer = RotatedAdam([{"params": [ours[0], ours[2]]}, {"params": [ours[1]], "rotate": False}], lr=0.02, max_dim=5)
    optimizer.add_param_group({"params": [ours[3]]})  # too large on both sides
    adamw = torch.optim.AdamW([theirs[0], theirs[2], theirs[1], theirs[3]], lr=0.02)
    for n in range(6):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = None if n == 2 and a is ours[1] else torch.randn(a.shape)
            b.grad = None if a.grad is None else a.grad.clone()
        optimizer.step()
        adamw.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumes_bit_for_bit_and_low_precision_follows_float32(dtype):
    weight, bias = torch.randn(6, 4).to(dtype), torch.randn(4).to(dtype)
    grads = list(zip(gradients(14, 6, 4, dtype=dtype), gradients(14, 4, seed=1, dtype=dtype), strict=True))

    def run(params, optimizer, part):
        for pair in part:
            for p, g in zip(params, pair, strict=True):
                p.grad = g.to(p.dtype)
            optimizer.step()

    def fresh(kind=dtype):
        params = [nn.Parameter(t.to(kind, copy=True)) for t in (weight, bias)]
        return params, RotatedAdam(params, lr=0.01, refresh_every=4)

    params, optimizer = fresh()
    run(params, optimizer, grads[:7])
    others, resumed = fresh()
    for p, other in zip(params, others, strict=True):
        other.data.copy_(p.data)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for some, one in ((params, optimizer), (others, resumed)):
        run(some, one, grads[7:])
    assert all(torch.equal(p, other) for p, other in zip(params, others, strict=True))
    assert optimizer.state[params[0]]["row_basis"].dtype == torch.float32
    wide, reference = fresh(torch.float32)
    run(wide, reference, grads)
    for p, other in zip(params, wide, strict=True):
        torch.testing.assert_close(p.float(), other, rtol=0, atol=0.05 if dtype == torch.bfloat16 else 0)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        return torch.tanh(self.linear(x))


def data(count):
    g = torch.Generator().manual_seed(3)
    return [tuple(torch.randn(2, 4, 6, generator=g)) for _ in range(count)]


def pipeline(depth, method="pipeoptim"):
    torch.manual_seed(1)
    stages = [Layer() for _ in range(depth)]
    return stages, po.Emulator(stages, lambda p: RotatedAdam(p, lr=0.01, refresh_every=3), mse, method)


def test_depth_one_is_a_plain_loop_and_a_resumed_pipeline_the_undisturbed_one():
    (stage,), pipe = pipeline(1)
    plain = copy.deepcopy(stage)
    optimizer = RotatedAdam(plain.parameters(), lr=0.01, refresh_every=3)
    for x, y in data(8):
        pipe.step(x, target=y)
        optimizer.zero_grad()
        mse(plain(x), y).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(stage.parameters(), plain.parameters(), strict=True))
    stages, pipe = pipeline(3)
    for x, y in data(7):
        pipe.step(x, target=y)
    pipe.drain()
    others, resumed = pipeline(3)
    for k in range(3):
        resumed.load_stage_state_dict(k, copy.deepcopy(pipe.stage_state_dict(k)))
    for one in (pipe, resumed):
        for x, y in data(8):
            one.step(x, target=y)
        one.drain()
    pairs = zip(nn.Sequential(*stages).parameters(), nn.Sequential(*others).parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert pipe.weight_copies(0) == 2


def test_groups_of_linear_weights():
    embedding, head = nn.Embedding(9, 4), nn.Linear(4, 9)
    head.weight = embedding.weight
    module = nn.Sequential(embedding, nn.Linear(4, 4), nn.LayerNorm(4), head)
    inside, outside = linear_weights(module)
    assert [id(p) for p in inside["params"]] == [id(module[1].weight)]
    assert len(outside["params"]) == 5 and outside["rotate"] is False
    optimizer = RotatedAdam([inside, outside])
    module(torch.arange(4)).sum().backward()
    optimizer.step()
    assert [p for p, state in optimizer.state.items() if "row_basis" in state] == inside["params"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, "lr of RotatedAdam is -1.0, must be a number of at least 0"),
        ({"betas": (0.9, 1.0)}, "beta2 of RotatedAdam is 1.0, must be a number of at least 0, and below 1"),
        ({"betas": 0.9}, "must be two numbers"),
        ({"foreach": 3}, "foreach of RotatedAdam is 3, must be True, False or None"),
        ({"sides": "both"}, "sides of RotatedAdam is 'both', must be one of bilateral, unilateral"),
        ({"refresh_every": 0}, "refresh_every of RotatedAdam is 0"),
        ({"rotate": 1}, "rotate of RotatedAdam is 1, must be True or False"),
        ({"weight_decay": float("nan")}, "weight_decay of RotatedAdam is nan"),
    ],
)
def test_impossible_options_are_refused_in_groups_as_well(options, words):
    with pytest.raises(po.ConfigError, match=words):
        RotatedAdam([nn.Parameter(torch.ones(2, 2))], **options)
    with pytest.raises(po.ConfigError, match=words):
        RotatedAdam([{"params": [nn.Parameter(torch.ones(2, 2))], **options}])
