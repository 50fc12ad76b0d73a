"""Weights that several stages use: against the real tied model, an oracle that delays the sums, and one process per stage."""

import copy
import itertools
import math
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import oracle
import pipeoptim as po
import stage_processes
import tied_cases as cases
from exactly import assert_equal
from pipeoptim.methods import mean_gap
from pipeoptim.schedule import ActionKind, Program, common_delay, replay

WIDTH = 3
mse = nn.functional.mse_loss


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    def forward(self, x):
        return torch.tanh(self.linear(x))


def tied_layers(depth, holders):
    """Stages that share one weight, by identity."""
    stages = [Layer() for _ in range(depth)]
    for k in holders[1:]:
        stages[k].linear.weight = stages[holders[0]].linear.weight
    return stages


def data(n, batch):
    g = torch.Generator().manual_seed(0)
    return [tuple(torch.randn(batch, WIDTH, generator=g, dtype=torch.float64) for _ in "xy") for _ in range(n)]


def adamw(params):
    return torch.optim.AdamW(params, lr=0.02)


@pytest.mark.parametrize("method", [name for name, method in po.METHODS.items() if method.program(4, 4).flushes])
@pytest.mark.parametrize("clip", [None, po.Clip(0.05, "global")])
@pytest.mark.parametrize(("depth", "m"), [(1, 2), (2, 1), (3, 3), (4, 2)])
def test_flush_methods_equal_plain_training_of_the_tied_model(method, clip, depth, m):
    torch.manual_seed(2)
    holders = sorted({0, depth // 2, depth - 1})
    stages = tied_layers(depth, holders)
    plain = nn.Sequential(*copy.deepcopy(nn.ModuleList(stages)))
    assert plain[0].linear.weight is plain[-1].linear.weight
    opt = adamw(plain.parameters())
    stages, tied = po.untie(stages)
    assert [tie.holders for tie in tied] == ([tuple(holders)] if depth > 1 else [])
    pipe = po.Emulator(stages, adamw, mse, method, m, tied=tied, clip=clip)
    for x, y in data(6, 2 * m):
        pipe.step(x, target=y)
        for xm, ym in zip(x.chunk(m), y.chunk(m), strict=True):
            (mse(plain(xm), ym) / m).backward()
        if clip is not None:
            norm = nn.utils.clip_grad_norm_(plain.parameters(), clip.max_norm)
            assert pipe.grad_norm(depth - 1) == pytest.approx(float(norm), rel=1e-12)
        opt.step()
        opt.zero_grad()
    for ours, theirs in zip(stages, plain, strict=True):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


class DelayedSum:
    """The gradient of the first tensor of some stages becomes the sum of theirs ``delay`` mini-batches ago; zero before."""

    def __init__(self, holders, delay):
        self.holders, self.delay, self.sums = holders, delay, []

    def __call__(self, t, gradients):
        assert len(self.sums) == t
        self.sums.append(sum(gradients[k][0] for k in self.holders))
        found = self.sums[t - self.delay] if t >= self.delay else torch.zeros_like(self.sums[t])
        return [[found, *own[1:]] if k in self.holders else own for k, own in enumerate(gradients)]


@pytest.mark.parametrize("method", ["naive", "pipedream", "pipeoptim", "pipeoptim_stash"])
@settings(max_examples=20)
@given(depth=st.integers(2, 5), m=st.integers(1, 5), rule=st.sampled_from(["sgd", "momentum"]), seed=st.integers(0, 2**16))
def test_asynchronous_methods_equal_an_oracle_that_delays_the_sums(method, depth, m, rule, seed):
    torch.manual_seed(seed)
    rule = oracle.Rule(rule)
    stages = tied_layers(depth, [0, depth - 1])
    initial = [[p.detach().clone() for p in s.parameters()] for s in stages]
    stages, tied = po.untie(stages)
    total = 3 * depth + 3
    segments = [depth + 1, 2, total - depth - 3]
    batches = data(total, m)
    pipe = po.Emulator(stages, rule.torch, mse, method, m, tied=tied)
    oracle.feed(pipe, batches, segments)

    def predicted(u):
        pairs = zip(u.stage.weights[u.at_f], rule.ahead(u.stage, u.at_f), strict=True)
        return [w - rule.lr * u.gap * d for w, d in pairs]

    at_forward, at_backward = (lambda u: u.stage.weights[u.at_f]), (lambda u: u.stage.weights[u.at_b])
    uses = {
        "naive": (at_forward, at_backward),
        "pipedream": (at_forward, at_forward),
        "pipeoptim": (predicted, at_backward),
        "pipeoptim_stash": (predicted, predicted),
    }[method]
    change = DelayedSum([0, depth - 1], math.ceil(depth / m))
    theirs, _ = oracle.train(initial, rule, segments, batches, m, *uses, clip=change)
    assert not torch.equal(initial[0][0], theirs[0].weights[-1][0])
    for k, stage in enumerate(stages):
        for p, w in zip(stage.parameters(), theirs[k].weights[-1], strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=0, atol=1e-10)


@settings(max_examples=15)
@given(depth=st.integers(2, 5), m=st.integers(1, 6), overlap=st.booleans(), seed=st.integers(0, 2**16))
def test_the_delay_is_the_smallest_that_holds_at_any_speed(depth, m, overlap, seed):
    rng = random.Random(seed)
    program = Program("async_1f1b", depth, m, None, overlap)
    holders = tuple(sorted(rng.sample(range(depth), rng.randint(2, depth))))
    delay, needed = common_delay(program, holders), 0
    if (holders[0], holders[-1]) == (0, depth - 1):
        assert delay == math.ceil(depth / m)
    plans = [[(k, action) for n in range(2 * depth + 2) for action in program.step(k, n)] for k in range(depth)]
    for slow in [*holders, *holders, None, None]:  # speeds that differ by orders of magnitude
        lasts = {(k, kind): 10 ** rng.uniform(-6, -3) * (1e9 if k == slow else 1) for k in range(depth) for kind in ActionKind}
        spans = replay(plans, depth, lambda k, kind, lasts=lasts: lasts[k, kind])
        updates = {(s.k, s.action.number): s for s in spans if s.action.kind is ActionKind.U}
        for n, j, k in itertools.product(range(delay, 1 + max(n for _, n in updates)), holders, holders):
            if j != k and (k, n) in updates:
                there = (d for d in range(n + 1) if (j, n - d) in updates and updates[j, n - d].end <= updates[k, n].start)
                needed = max(needed, next(there))
    assert needed == delay


def every_method():
    for name, method in po.METHODS.items():
        for m in (1, 4):
            if m == 4 or not method.at_least_depth_microbatches:
                yield name, m


@pytest.mark.parametrize(("method", "m"), list(every_method()))
def test_copies_are_equal_bit_for_bit_at_every_version(method, m):
    """Stages 0, 1 and 3 of 4; with drains, schedules, momentum, weight decay, and where it can be had a norm over all stages."""
    holders, versions = [0, 1, 3], {}
    torch.manual_seed(4)
    stages, tied = po.untie(tied_layers(4, holders))

    def note(k, version):
        if k in holders:
            versions.setdefault(version, []).append(stages[k].linear.weight.detach().clone())

    options = {"clip": po.Clip(0.05, "global")} if m >= 3 else {}
    rates = {"schedulers": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 16)}
    rate, program = po.METHODS[method].lr_scale, po.METHODS[method].program(4, m)
    gaps = {mean_gap(po.METHODS[method], program, k) for k in holders} if po.METHODS[method].compensation else set()
    if (rate is not None and len({rate(program, k, 0) for k in holders}) > 1) or len(gaps) > 1:
        with pytest.raises(po.ConfigError, match="would diverge"):
            po.Emulator(stages, adamw, mse, method, m, tied=tied)
        return
    pipe = po.Emulator(stages, adamw, mse, method, m, tied=tied, on_update=note, **rates, **options)
    delay = common_delay(pipe.program, tuple(holders))
    start = stages[0].linear.weight.detach().clone()
    for n, (x, y) in enumerate(data(13, m)):
        pipe.step(x, target=y)
        if n in (3, 9):
            pipe.drain()
            assert len({pipe.version(k) for k in range(4)}) == 1
    pipe.drain()
    assert sorted(versions) == list(range(1, 14))
    for version, copies in versions.items():
        assert len(copies) == 3
        assert all(torch.equal(copies[0], other) for other in copies[1:]), f"copies differ at version {version}"
        moved = not torch.equal(copies[0], start)
        assert moved == (version > delay), f"version {version}: {'moved' if moved else 'did not move'}, the delay is {delay}"


@pytest.mark.parametrize("m", [1, 4])
def test_a_resumed_run_goes_on_bit_for_bit(m, tmp_path):
    def build():
        torch.manual_seed(3)
        stages, tied = po.untie(tied_layers(4, [0, 3]))
        return stages, po.Emulator(stages, adamw, mse, "pipeoptim", m, tied=tied)

    stages, pipe = build()
    for n, (x, y) in enumerate(data(12, m)):
        pipe.step(x, target=y)
        if n == 6:
            pipe.drain()
            states = copy.deepcopy([pipe.stage_state_dict(k) for k in range(4)])
            po.save_sharded(pipe, tmp_path / "saved")
    pipe.drain()
    assert len(states[0]["tied"]["linear.weight"]["sums"]) == 4 // m
    for how in ("states", "sharded", "rolled back"):
        resumed, again = build()
        if how == "rolled back":  # a run that has gradients of its own under way
            for x, y in data(5, m):
                again.step(x, target=y)
            again.drain()
        if how == "sharded":
            assert po.load_sharded(again, tmp_path / "saved")
        else:
            for k in range(4):
                again.load_stage_state_dict(k, copy.deepcopy(states[k]))
        for x, y in data(12, m)[7:]:
            again.step(x, target=y)
        again.drain()
        for a, b in zip(stages, resumed, strict=True):
            assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True)), how


def test_without_a_gradient_on_one_stage_the_others_count():
    """A frozen tie is none, and a stage that does not use its copy in a mini-batch adds nothing."""
    stages, tied = po.untie(tied_layers(3, [0, 2]))
    stages[2].forward = lambda x: torch.tanh(nn.functional.linear(x, stages[2].linear.weight.detach(), stages[2].linear.bias))
    pipe = po.Emulator(stages, adamw, mse, "1f1b", tied=tied)
    before = stages[0].linear.weight.detach().clone()
    for x, y in data(2, 2):
        pipe.step(x, target=y)
    assert torch.equal(stages[0].linear.weight, stages[2].linear.weight)
    assert not torch.equal(before, stages[0].linear.weight)
    frozen, tied = po.untie(tied_layers(3, [0, 2]))
    for k in (0, 2):
        frozen[k].linear.weight.requires_grad_(False)
    before = frozen[0].linear.weight.clone()
    trained = [adamw([p for p in stage.parameters() if p.requires_grad]) for stage in frozen]
    for make in (trained, adamw):  # with its weight decay
        pipe = po.Emulator(frozen, make, mse, tied=tied)
        for x, y in data(4, 2):
            pipe.step(x, target=y)
        pipe.drain()
        assert torch.equal(before, frozen[0].linear.weight)


ENDS = [[(0, "linear.weight"), (3, "linear.weight")]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tied": [[(0, "linear.weight"), (0, "linear.bias")]]}, "two or more different stages of 0 .. 3"),
        ({"tied": [[(0, "linear.weight"), (4, "linear.weight")]]}, "two or more different stages of 0 .. 3"),
        ({"tied": [[(0, "linear.weight")]]}, "two or more different stages"),
        ({"tied": [(0, "linear.weight"), (3, "linear.weight")]}, "lists of .stage, name of the parameter"),
        ({"tied": [ENDS[0], [(0, "linear.weight"), (1, "linear.weight")]]}, "'linear.weight' of stage 0 = .* twice"),
        ({"tied": [[(0, "linear.weight"), (3, "weight")]]}, "'weight' of stage 3, which has no such parameter"),
        ({"tied": [[(0, "linear.weight"), (3, "linear.bias")]]}, r"float64 \[3, 3\] on stage 0 and .* \[3\] on stage 3"),
        ({"tied": ENDS, "clip": 1.0}, "scope 'stage' .* use scope 'global'"),
        ({"tied": ENDS, "clip": po.Clip(1.0, "global_delayed")}, "scope 'global_delayed' .* use scope 'global'"),
        ({"tied": ENDS, "scaler": lambda: torch.amp.GradScaler("cpu")}, "without a scaler"),
        ({"tied": ENDS, "processes": 2}, "one stage per process"),
        ({"tied": ENDS, "method": "pipemare"}, "scales the learning rates of stages .0, 3."),
        (
            {"tied": ENDS, "optimizers": [torch.optim.Adam, adamw, adamw, adamw]},
            r"has Adam\(.*lr=0.001.* on stage 0 and AdamW\(.*lr=0.02.* on stage 3",
        ),
        ({"tied": ENDS, "optimizers": [lambda p: adamw(list(p)[1:]), adamw, adamw, adamw]}, "nothing that moves it on stage 0"),
    ],
)
def test_what_would_move_copies_apart_is_refused_with_a_sentence(options, words):
    stages = [Layer() for _ in range(4)]
    makers = options.pop("optimizers", [adamw] * 4)
    optimizers = [make(stage.parameters()) for make, stage in zip(makers, stages, strict=True)]
    with pytest.raises(po.ConfigError, match=words):
        po.Emulator(stages, optimizers, mse, **options)


def test_a_sparse_gradient_is_refused_with_a_sentence():
    stages = [nn.Embedding(4, 3, sparse=True), nn.Linear(3, 4, bias=False)]
    tied = [[(0, "weight"), (1, "weight")]]
    pipe = po.Emulator(stages, lambda p: torch.optim.SGD(p, 0.1), nn.functional.cross_entropy, "1f1b", tied=tied)
    with pytest.raises(po.ConfigError, match="make its Embedding with sparse=False"):
        pipe.step(torch.tensor([1, 2]), target=torch.tensor([1, 2]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tied")
    stage_processes.run(Path(__file__).parent / "tied_worker.py", cases.DEPTH, str(path))
    return path


@pytest.mark.parametrize("name", cases.CASES)
def test_processes_equal_the_emulator_bit_for_bit(folder, name):
    case = cases.CASES[name]
    parts = [cases.stage(case, k) for k in range(cases.DEPTH)]
    modules, optimizers, rates = map(list, zip(*parts, strict=True))
    pipe = po.Emulator(modules, optimizers, cases.loss_fn, case.method, case.m, schedulers=rates, **cases.options(case))
    ours = cases.train(pipe)
    for k in range(cases.DEPTH):
        theirs = torch.load(folder / f"{name}-{k}.pt", weights_only=False)
        assert_equal(ours[k]["state"], theirs["state"], f"stage {k}")
        assert ours[k]["norms"] == theirs["norms"]
        assert_equal(ours[k]["losses"], theirs["losses"], "losses")
    for tie in case.tied:
        first, *others = [modules[k].get_parameter(own) for k, own in tie]
        assert all(torch.equal(first, other) for other in others)


def test_processes_that_were_told_different_things_say_so(folder):
    for k in range(cases.DEPTH):
        told = torch.load(folder / f"told-{k}.pt")
        assert "tied=['mix.weight' of stage 0" in told["other tied"] and "tied=['embed.weight' of stage 0" in told["other tied"]
        assert "lr=0.02" in told["other rate"] and "lr=0.5" in told["other rate"] and "would diverge" in told["other rate"]
