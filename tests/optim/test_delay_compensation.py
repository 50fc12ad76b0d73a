"""Error feedback and spike compensation against their formulas in float64, and what works through any wrapped optimizer."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Muon

import pipeoptim as po
from pipeoptim.optim import DelayCompensation, ErrorFeedback, RotatedAdam, SpikeCompensation
from pipeoptim.stability import linear_optimizer
from pipeoptim.stability.pipelines import linear_stages

mse = nn.functional.mse_loss
KINDS = [ErrorFeedback, SpikeCompensation]


def gradients(count: int, shape: tuple[int, ...] = (4, 3)) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(2)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(count)]


def path(make: Any, grads: list[torch.Tensor], before_each: Any = None) -> list[torch.Tensor]:
    """The weights before the first step and after each."""
    w = nn.Parameter(torch.ones(grads[0].shape, dtype=torch.float64))
    optimizer = make([w])
    found = [w.detach().clone()]
    for n, grad in enumerate(grads):
        if before_each is not None:
            before_each(optimizer, n)
        w.grad = grad.clone()
        optimizer.step()
        found.append(w.detach().clone())
    return found


INNER = {
    "sgd": lambda p: SGD(p, lr=0.1),
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "maximize": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, maximize=True),
    "adam": lambda p: Adam(p, lr=0.1, weight_decay=0.1),
    "adamw": lambda p: AdamW(p, lr=0.1, betas=(0.8, 0.9)),
    "muon": lambda p: Muon(p, lr=0.1),
    "rotated": lambda p: RotatedAdam(p, lr=0.1, refresh_every=2),
}


@pytest.mark.parametrize("inner", ["sgd", "momentum", "adam", "muon", "rotated"])
@pytest.mark.parametrize("gap", [1, 3, 0.75])
def test_error_feedback_is_the_update_less_what_was_extrapolated(inner, gap):
    """Where nothing of the update depends on the weights, u(t) is that of the plain run; x = y - s u(t-1) in its weights y."""

    def make(params):
        optimizer = INNER[inner](params)
        optimizer.param_groups[0]["weight_decay"] = 0.0
        return optimizer

    grads = gradients(8)
    y = path(make, grads)
    x = path(lambda p: ErrorFeedback(make(p), gap), grads)
    for t in range(1, 9):
        torch.testing.assert_close(x[t], y[t] + gap * (y[t] - y[t - 1]), rtol=0, atol=1e-11)
    if gap == 1:
        u = [a - b for a, b in itertools.pairwise(y)]
        for t in range(1, 8):
            torch.testing.assert_close(x[t + 1], x[t] - 2 * u[t] + u[t - 1], rtol=0, atol=1e-11)


def test_a_gap_that_changes_undoes_exactly_what_was_extrapolated():
    gaps, grads = [0, 0, 2, 2, 1, 0, 0, 3], gradients(8)
    y = path(INNER["sgd"], grads)
    x = path(lambda p: ErrorFeedback(SGD(p, lr=0.1)), grads, lambda optimizer, n: optimizer.set_stage_gap(gaps[n]))
    for t, s in enumerate(gaps, start=1):
        torch.testing.assert_close(x[t], y[t] + s * (y[t] - y[t - 1]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("gap", [1, 4, 0.5])
@pytest.mark.parametrize("sign", [1, -1])
def test_spike_compensation_of_sgd_equals_the_formula(gap, sign):
    grads = gradients(8)
    w, v, m = torch.ones(4, 3, dtype=torch.float64), 0.0, 0.9
    found = path(lambda p: SpikeCompensation(INNER["momentum" if sign > 0 else "maximize"](p), gap), grads)
    for t, grad in enumerate(grads, start=1):
        g = sign * grad + 0.1 * w
        v = m * v + g
        w = w - 0.1 * (m**gap * v + (1 - m**gap) / (1 - m) * g)
        torch.testing.assert_close(found[t], w, rtol=0, atol=1e-12)


@pytest.mark.parametrize("coupled", [True, False])
def test_spike_compensation_of_adam_equals_the_formula(coupled):
    grads, gap = gradients(8), 3
    b1, b2 = (0.9, 0.999) if coupled else (0.8, 0.9)
    w, m, v = torch.ones(4, 3, dtype=torch.float64), 0.0, 0.0
    found = path(lambda p: SpikeCompensation(INNER["adam" if coupled else "adamw"](p), gap), grads)
    for t, grad in enumerate(grads, start=1):
        g = grad + 0.1 * w if coupled else grad
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        numerator = b1**gap * m / (1 - b1**t) + (1 - b1**gap) * g
        w = (w if coupled else w * (1 - 0.1 * 0.01)) - 0.1 * numerator / ((v / (1 - b2**t)).sqrt() + 1e-8)
        torch.testing.assert_close(found[t], w, rtol=0, atol=1e-11)


def test_a_late_gradient_has_the_effect_that_it_would_have_had_in_time():
    """What spike compensation is for: one gradient, s updates late, and from then on the weights of one that was in time."""
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    in_time = path(lambda p: SGD(p, lr=0.1, momentum=0.9), [one, *[zero] * 9])
    late = path(lambda p: SpikeCompensation(SGD(p, lr=0.1, momentum=0.9), 3), [*[zero] * 3, one, *[zero] * 6])
    for t in range(4, 11):
        torch.testing.assert_close(late[t], in_time[t], rtol=0, atol=1e-12)
    nesterov = path(lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True), gradients(6))
    for a, b in zip(nesterov, path(lambda p: SpikeCompensation(SGD(p, lr=0.1, momentum=0.9), 1), gradients(6)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inner", ["sgd", "momentum", "adamw"])
def test_without_a_gap_it_is_the_optimizer_bit_for_bit(kind, inner):
    plain, wrapped = path(INNER[inner], gradients(5)), path(lambda p: kind(INNER[inner](p), gap=0), gradients(5))
    assert all(torch.equal(a, b) for a, b in zip(plain, wrapped, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inner", ["momentum", "adamw"])
def test_schedulers_groups_states_and_scalers_work_through_it(kind, inner):
    def make():
        w, b = (nn.Parameter(torch.ones(n, dtype=torch.float64)) for n in (3, 2))
        optimizer = kind(INNER[inner]([w]), gap=2)
        optimizer.add_param_group({"params": [b], "lr": 0.01})
        return [w, b], optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)

    def run(params, optimizer, scheduler, seeds):
        for seed in seeds:
            for p, g in zip(params, (gradients(9, (3,))[seed], gradients(9, (2,))[seed]), strict=True):
                p.grad = None if seed == 3 and p is params[1] else g
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    params, optimizer, scheduler = make()
    run(params, optimizer, scheduler, range(4))
    assert [group["lr"] for group in optimizer.optimizer.param_groups] == pytest.approx([0.025, 0.0025])
    others, resumed, rates = make()
    for p, other in zip(params, others, strict=True):
        other.data.copy_(p.data)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    rates.load_state_dict(scheduler.state_dict())
    twin = copy.deepcopy(resumed)
    assert type(twin) is kind and twin.gap == 2 and twin.optimizer is not resumed.optimizer
    for some in ((params, optimizer, scheduler), (others, resumed, rates)):
        run(*some, range(4, 9))
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(sum((p**2).sum() for p in params)).backward()
    scaler.unscale_(optimizer)
    wanted = [2 * p.detach() for p in params]
    assert all(torch.equal(p.grad, g) for p, g in zip(params, wanted, strict=True))
    params[0].grad[0] = float("inf")
    before = [p.detach().clone() for p in params]
    scaler._per_optimizer_states.clear()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return torch.tanh(self.linear(x))


def pipeline(method, make, depth=3, m=1, **options):
    torch.manual_seed(0)
    stages = [Layer() for _ in range(depth)]
    return stages, po.Emulator(stages, make, mse, method, m, **options)


def data(count, rows):
    g = torch.Generator().manual_seed(1)
    return [tuple(torch.randn(2, rows, 3, generator=g)) for _ in range(count)]


def finals(stages, pipe, rows, count=9):
    for x, y in data(count, rows):
        pipe.step(x, target=y)
    pipe.drain()
    return [p.detach().clone() for stage in stages for p in stage.parameters()]


def sgd(params):
    return SGD(params, lr=0.1, momentum=0.9)


def test_a_pipeline_sets_the_gap_of_each_stage():
    made: list[DelayCompensation] = []

    def wrapped(params):
        made.append(ErrorFeedback(sgd(params)))
        return made[-1]

    for method, m, gaps in (("pipedream", 1, [3, 2, 1, 0]), ("naive", 4, [0.75, 0.5, 0.25, 0]), ("pipedream_2bw", 4, [1] * 4)):
        made.clear()
        pipeline(method, wrapped, 4, m)
        assert [one.gap_in_force for one in made] == gaps
    made.clear()
    pipeline("gpipe", wrapped, 2, 2)
    assert [one.gap_in_force for one in made] == [0, 0]


def test_the_method_wraps_what_the_user_would_wrap():
    by_hand = finals(*pipeline("pipedream_2bw", lambda p: ErrorFeedback(sgd(p)), m=3), 3)
    by_method = finals(*pipeline("pipedream_2bw+error_feedback", sgd, m=3), 3)
    plain = finals(*pipeline("pipedream_2bw", sgd, m=3), 3)
    assert all(torch.equal(a, b) for a, b in zip(by_hand, by_method, strict=True))
    assert not torch.equal(by_hand[0], plain[0])
    combined = finals(*pipeline("pipedream_2bw+error_feedback", lambda p: two(list(p)), m=3), 3)
    apart = finals(
        *pipeline("pipedream_2bw", lambda p: po.CombinedOptimizer(*map(ErrorFeedback, two(list(p)).optimizers)), m=3), 3
    )
    assert all(torch.equal(a, b) for a, b in zip(combined, apart, strict=True))


def two(params):
    return po.CombinedOptimizer(Muon(params[:1], lr=0.01), AdamW(params[1:], lr=0.01))


@pytest.mark.parametrize("method", ["pipedream_2bw+error_feedback", "spike_compensation"])
def test_depth_one_is_a_plain_loop_and_a_resumed_run_the_undisturbed_one(method):
    (stage,), pipe = pipeline(method, sgd, 1)
    plain = copy.deepcopy(stage)
    found, optimizer = finals([stage], pipe, 2), sgd(plain.parameters())
    for x, y in data(9, 2):
        optimizer.zero_grad()
        mse(plain(x), y).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(found, plain.parameters(), strict=True))
    stages, pipe = pipeline(method, sgd, m=3)
    finals(stages, pipe, 3, 5)
    others, resumed = pipeline(method, sgd, m=3)
    for k in range(3):
        resumed.load_stage_state_dict(k, copy.deepcopy(pipe.stage_state_dict(k)))
    both = [finals(stages, pipe, 3), finals(others, resumed, 3)]
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


def test_a_sharded_checkpoint_carries_it_to_another_number_of_stages(tmp_path):
    """What was extrapolated, and bases and averages of matrices, go with their weights; the gap is that of the new stage."""

    def make(params):
        return ErrorFeedback(RotatedAdam(params, lr=0.01, refresh_every=3))

    def cut(depth):
        torch.manual_seed(0)
        blocks = [Layer() for _ in range(4)]
        per = 4 // depth
        stages = [nn.Sequential(*blocks[k * per : (k + 1) * per]) for k in range(depth)]
        names = [{f"{k * per + i}.{n}": f"{i}.{n}" for i in range(per) for n in blocks[0].state_dict()} for k in range(depth)]
        return names, po.Emulator(stages, make, mse, "pipedream_2bw", 4), nn.Sequential(*blocks)

    names, pipe, model = cut(4)
    for x, y in data(5, 4):
        pipe.step(x, target=y)
    po.save_sharded(pipe, tmp_path / "saved", names).result()
    theirs, resumed, other = cut(2)
    po.load_sharded(resumed, tmp_path / "saved", theirs)
    for x, y in data(5, 4):
        pipe.step(x, target=y)
        resumed.step(x, target=y)
    pipe.drain()
    resumed.drain()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_stability_is_not_claimed_for_what_corrects_updates():
    method = po.METHODS["spike_compensation"]
    with pytest.raises(po.ConfigError, match="is not known: it corrects updates for the version gap"):
        linear_stages(method, method.program(2, 1), linear_optimizer("sgd"))


def test_what_predicts_the_forward_of_spike_compensation():
    """Velocity form and weight form agree at a constant gradient and differ otherwise; its last stage predicts and corrects nothing."""
    velocity, weight = (finals(*pipeline("spike_compensation", sgd, prediction=kind), 2) for kind in ("paper", "displacement"))
    assert not torch.equal(velocity[0], weight[0])
    optimizer = SpikeCompensation(sgd([nn.Parameter(torch.ones(2))]), gap=2)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(po.predict_weights(optimizer, 3)[0], po.predict_weights(optimizer.optimizer, 3)[0])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: ErrorFeedback(3), "ErrorFeedback was given 3, must be given a torch.optim.Optimizer"),
        (lambda p: ErrorFeedback(SGD(p), gap=-1), "gap of ErrorFeedback is -1, must be 'auto' or a number"),
        (lambda p: ErrorFeedback(SGD(p), gap="all"), "gap of ErrorFeedback is 'all'"),
        (lambda p: ErrorFeedback(SpikeCompensation(SGD(p))), "corrects for the delay already"),
        (lambda p: ErrorFeedback(two(p)), "wrap each of its optimizers"),
        (lambda p: SpikeCompensation(torch.optim.RMSprop(p)), "knows the momentum of SGD, Adam and AdamW, not that of RMSprop"),
        (lambda p: SpikeCompensation(SGD(p, momentum=0.9, nesterov=True)), "nesterov of SGD is True"),
        (lambda p: ErrorFeedback(SGD(p)).step(), "gap of ErrorFeedback is 'auto', which a pipeline sets"),
        (lambda p: po.predict_weights(ErrorFeedback(SGD(p), 1), 2), "ErrorFeedback cannot be predicted: its weights lie ahead"),
        (
            lambda p: pipeline("pipeoptim", lambda q: ErrorFeedback(SGD(q, lr=0.1))),
            "ErrorFeedback compensates the delay by itself, and method 'pipeoptim' predicts",
        ),
        (
            lambda p: pipeline("pipedream_2bw+error_feedback", lambda q: ErrorFeedback(SGD(q)), m=3),
            "some methods bring their own",
        ),
        (
            lambda p: po.predict_weights(SpikeCompensation(SGD(p), 1), 2, kind="in_progress"),
            "knows the steps of SGD, not as SpikeCompensation",
        ),
        (lambda p: pipeline("spike_compensation", Muon), "not that of|Muon only supports"),
    ],
)
def test_what_cannot_work_is_refused(make, words):
    with pytest.raises((po.ConfigError, ValueError), match=words):
        make([nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))])
