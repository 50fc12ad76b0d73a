"""AdaGC against an oracle that keeps every version; the plain loops that it equals bit for bit are in tests/engine/test_on_bad.py."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import oracle
import pipeoptim as po
from pipeoptim.config import Component, TrainConfig
from pipeoptim.options import options_of_run
from pipeoptim.train.checks import check_settings
from test_in_progress import in_progress
from test_loop_clip import Layer, data, loss_fn, momentum

RULE = {"lambda_rel": 1.05, "lambda_abs": 0.1, "beta": 0.8, "warmup": 3}


class ClipByTensor:
    """AdaGC spelled out, with the running norms of every version."""

    def __init__(self, depth, skip):
        self.skip, self.made = skip, 0
        self.means = [[[None, None] for _ in range(depth)]]  # version -> stage -> tensor -> its mean
        self.updates = [0]

    def factors(self, t, k, grads):
        norms = [float(g.norm()) for g in grads]
        if self.updates[t] < RULE["warmup"]:
            return norms, [min(1.0, RULE["lambda_abs"] / (math.hypot(*norms) + 1e-6))] * len(norms)
        limits = [RULE["lambda_abs"] if mean is None else RULE["lambda_rel"] * mean for mean in self.means[t][k]]
        return norms, [min(1.0, limit / norm) if norm else 1.0 for limit, norm in zip(limits, norms, strict=True)]

    def clipped(self, u, grads):
        return [g * h for g, h in zip(grads, self.factors(u.at_f, u.k, grads)[1], strict=True)]

    def __call__(self, t, sums):
        self.updates.append(self.updates[t] + (t not in self.skip))
        self.means.append(copy.deepcopy(self.means[t]))
        if t in self.skip:
            return sums
        found = []
        for k, grads in enumerate(sums):
            norms, factors = self.factors(t, k, grads)
            for n, (norm, h) in enumerate(zip(norms, factors, strict=True)):
                mean = self.means[t][k][n]
                if not norm:  # saturated by the outlier: it says nothing of the tensor's gradients
                    continue
                if mean is None:
                    self.means[t + 1][k][n] = norm * h
                elif self.updates[t] < RULE["warmup"]:
                    self.means[t + 1][k][n] = min(mean, norm * h)
                else:
                    self.means[t + 1][k][n] = RULE["beta"] * mean + (1 - RULE["beta"]) * norm * h
            found.append([g * h for g, h in zip(grads, factors, strict=True)])
        return found


@pytest.mark.parametrize(
    ("m", "prediction", "skip"), [(1, {}, {5}), (2, {"prediction": "in_progress"}, {6}), (4, {"prediction": "in_progress"}, ())]
)
def test_weights_and_predictions_equal_the_oracle(m, prediction, skip):
    """The estimate of a gradient in progress is clipped as the gradient will be, and moves no running norm."""
    depth, total = 3, 14
    torch.manual_seed(m)
    rule = oracle.Rule("momentum")
    stages = [Layer() for _ in range(depth)]
    initial = [[p.detach().clone() for p in s.parameters()] for s in stages]
    batches = data(total, m)
    batches[9][0].mul_(1e6)
    for n in skip:
        batches[n][1][0, 0] = math.nan
    pipe = po.Emulator(stages, rule.torch, loss_fn, "pipeoptim", m, clip=po.AdaGC(**RULE), on_bad="skip", **prediction)
    oracle.feed(pipe, batches, [total])
    clip = ClipByTensor(depth, skip)

    def stale(u):
        now, direction = u.stage.weights[u.at_f], rule.ahead(u.stage, u.at_f)
        return [w - rule.lr * u.gap * d for w, d in zip(now, direction, strict=True)]

    def known(u):  # that the coming update is left out: the verdict came with the mini-batch's first micro-batch
        done = max(0, u.i - oracle.ahead(u.k, u.depth))
        return m > 1 and bool(u.gap) and done // m in skip and done % m > 0

    fresh = in_progress(rule, 1, clip)

    def forward(u):
        if known(u):
            return stale(replace(u, at_b=u.at_b - 1))
        return (fresh if prediction else stale)(u)

    theirs, _ = oracle.train(
        initial, rule, [total], batches, m, forward, lambda u: u.stage.weights[u.at_b], clip=clip, skip=skip
    )
    for k, stage in enumerate(stages):
        assert pipe.skipped(k) == sorted(skip)
        for p, w in zip(stage.parameters(), theirs[k].weights[-1], strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=0, atol=1e-10)


@pytest.mark.parametrize("at", [2, 7])
def test_resuming_is_exact_in_the_warm_up_and_behind_it(at):
    def build(clip):
        torch.manual_seed(3)
        stages = [Layer() for _ in range(3)]
        return stages, po.Emulator(stages, momentum, loss_fn, "pipeoptim", 2, clip=clip, prediction="in_progress")

    stages, pipe = build(po.AdaGC(**RULE))
    for n, (x, y) in enumerate(data(10, 4)):
        pipe.step(x, target=y)
        if n == at:
            pipe.drain()
            states = copy.deepcopy([pipe.stage_state_dict(k) for k in range(3)])
    pipe.drain()
    resumed, again = build(po.AdaGC(**RULE))
    for k in range(3):
        again.load_stage_state_dict(k, states[k])
    for x, y in data(10, 4)[at + 1 :]:
        again.step(x, target=y)
    again.drain()
    for a, b in zip(stages, resumed, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert [again.clipped_tensors(k) for k in range(3)] == [pipe.clipped_tensors(k) for k in range(3)]
    assert again.grad_norm(0) == pipe.grad_norm(0) > 0
    other = build(0.1)[1]  # another rule begins anew
    other.load_stage_state_dict(0, states[0])
    assert other.grad_norm(0) is None and other.clipped_tensors(0) is None


@pytest.mark.parametrize("clip", [po.AdaGC(**RULE), po.Clip(0.1, "global_delayed")])
@pytest.mark.parametrize("of", [None, 0.1, po.AdaGC(**RULE)])
def test_a_rule_that_a_state_says_nothing_of_begins_anew(clip, of):
    def build(clip):
        torch.manual_seed(3)
        return po.Emulator([Layer() for _ in range(3)], momentum, loss_fn, clip=clip)

    def fed(pipe, batches):
        for x, y in batches:
            pipe.step(x, target=y)
        pipe.drain()
        return copy.deepcopy([pipe.stage_state_dict(k) for k in range(3)])

    states, found = fed(build(of), data(6, 4)[:3]), []
    for pipe, before in ((build(clip), 5), (build(clip), 0)):
        fed(pipe, data(6, 4)[:before])
        for k in range(3):
            pipe.load_stage_state_dict(k, states[k])
        found.append([(state["module"], state["clip"]) for state in fed(pipe, data(6, 4)[3:])])
    pairs = list(zip(*map(tree_leaves, found), strict=True))
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def test_a_tensor_without_gradients_is_not_frozen_and_types_may_be_mixed():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).bfloat16())
    zero = nn.Parameter(torch.zeros(2))
    model[0].register_parameter("late", zero)
    uses = {"late": False}

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            y = model[1](model[0](x).bfloat16()).float()
            return y + (zero.sum() if uses["late"] else 0 * zero.sum())

    pipe = po.Emulator([Whole()], momentum, loss_fn, clip=po.AdaGC(warmup=2))
    for n in range(6):
        uses["late"] = n >= 3
        pipe.step(torch.ones(2, 3), target=torch.full((2, 3), 1e3))
        if n == 3:  # without a running norm it is clipped to lambda_abs
            assert zero.grad is None and math.isclose(float(zero.detach().norm()), 0.1, rel_tol=1e-5)
    assert pipe.clipped_tensors(0) >= 2 * 4 and all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: po.AdaGC(lambda_rel=0.0), "lambda_rel of AdaGC is 0.0"),
        (lambda: po.AdaGC(lambda_abs=math.inf), "lambda_abs of AdaGC is inf"),
        (lambda: po.AdaGC(lambda_abs=10**400), "lambda_abs of AdaGC is 1000"),
        (lambda: po.AdaGC(beta=1.0), "beta of AdaGC is 1.0"),
        (lambda: po.AdaGC(warmup=-1), "warmup of AdaGC is -1"),
        (lambda: po.Emulator([Layer()], momentum, loss_fn, clip="adacg"), "clip is 'adacg', must be 'adagc'"),
        (
            lambda: po.Emulator(
                [Layer() for _ in "ab"], momentum, loss_fn, clip="adagc", tied=[[(0, "linear.weight"), (1, "linear.weight")]]
            ),
            r"use AdaGC\(warmup=0\)",
        ),
    ],
)
def test_bad_input_is_refused_with_a_sentence(make, words):
    with pytest.raises(po.ConfigError, match=words):
        make()


@pytest.mark.parametrize("warmup", [0, 3])
def test_limits_beyond_the_numbers_of_tensors_clip_nothing(warmup):
    finals = []
    for clip in (None, po.AdaGC(10**30, 10**30, warmup=warmup), po.AdaGC(1e300, 1e300, warmup=warmup)):
        torch.manual_seed(3)
        modules = [nn.Linear(3, 3), nn.Linear(3, 3)]
        pipe = po.Emulator(modules, momentum, nn.functional.mse_loss, microbatches=2, clip=clip, prediction="in_progress")
        for n in range(6):
            pipe.step(torch.full((2, 3), float(n)), target=torch.ones(2, 3))
        finals.append(torch.cat([p.detach().flatten() for module in modules for p in module.parameters()]))
    assert torch.equal(finals[0], finals[1]) and torch.equal(finals[0], finals[2])


def test_copies_of_a_tied_weight_stay_equal():
    torch.manual_seed(2)
    stages = [Layer() for _ in range(3)]
    stages[2].load_state_dict(stages[0].state_dict())
    clip = po.AdaGC(warmup=0, lambda_abs=0.01)
    pipe = po.Emulator(
        stages, momentum, loss_fn, microbatches=2, clip=clip, tied=[[(0, "linear.weight"), (2, "linear.weight")]]
    )
    for x, y in data(9, 4):
        pipe.step(x, target=y)
    pipe.drain()
    assert torch.equal(stages[0].linear.weight, stages[2].linear.weight) and pipe.clipped_tensors(0) > 0


def test_the_command_line_says_it_in_the_way_of_other_clipping():
    run = TrainConfig(
        "r", model=Component("m:f"), data=Component("d:f"), optimizer=Component("sgd"), clip=0.5, clip_scope="adagc"
    )
    given = options_of_run(replace(run, outlier=10.0, audit=3))
    assert (given["clip"], given["outlier"], given["audit"]) == (po.AdaGC(lambda_abs=0.5), 10.0, 3)
    given = options_of_run(replace(run, clip=0.0))
    assert (given["clip"], given["outlier"], given["audit"]) == (None, None, None)
    with pytest.raises(po.ConfigError, match="outlier is 1000"):  # no float; files may hold it
        check_settings(replace(run, outlier=10**400))
