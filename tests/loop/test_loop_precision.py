"""Autocast, low-precision modules with float32 masters, loss scaling: each against a plain loop that does the same."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import pipeoptim as po

WIDTH = 6
loss_fn = nn.functional.mse_loss
BF16 = torch.bfloat16


def layers(n, dtype=torch.float32):
    torch.manual_seed(1)
    return [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)).to(dtype) for _ in range(n)]


def data(n, batch=8, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return [tuple(torch.randn(batch, WIDTH, generator=g).to(dtype) for _ in "xy") for _ in range(n)]


def momentum(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def adamw(params):
    return torch.optim.AdamW(params, lr=0.01)


def equal(stages, others):
    pairs = zip(nn.Sequential(*stages).parameters(), nn.Sequential(*others).parameters(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


# -- autocast ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["pipeoptim", "pipedream", "1f1b"])
@pytest.mark.parametrize("m", [1, 4])
def test_depth_1_equals_plain_autocast_bit_for_bit(method, m):
    ours = layers(1)
    plain = copy.deepcopy(ours[0])
    opt = adamw(plain.parameters())
    pipe = po.Emulator(ours, adamw, loss_fn, method, m, autocast=BF16)
    for x, y in data(8):
        pipe.step(x, target=y)
        for xm, ym in zip(x.chunk(m), y.chunk(m), strict=True):
            with torch.autocast("cpu", BF16):
                loss = loss_fn(plain(xm), ym)
            (loss / m).backward()
        opt.step()
        opt.zero_grad()
        assert equal(ours, [plain])
    with torch.autocast("cpu", BF16), torch.no_grad():
        expected = loss_fn(plain(x), y)
    assert torch.equal(pipe.eval_step(x, target=y), expected)
    assert not torch.equal(expected, loss_fn(plain(x), y)), "autocast changed nothing"


@pytest.mark.parametrize("m", [1, 2])
def test_a_cut_model_equals_plain_autocast_bit_for_bit(m):
    ours = layers(3)
    plain = nn.Sequential(*copy.deepcopy(ours))
    opt = adamw(plain.parameters())
    pipe = po.Emulator(ours, adamw, loss_fn, "gpipe", m, autocast=BF16)
    for x, y in data(6):
        pipe.step(x, target=y)
        for xm, ym in zip(x.chunk(m), y.chunk(m), strict=True):
            with torch.autocast("cpu", BF16):
                loss = loss_fn(plain(xm), ym)
            (loss / m).backward()
        opt.step()
        opt.zero_grad()
    assert equal(ours, list(plain))


class Recomputed(nn.Sequential):
    """Runs its forward again during the backward."""

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


@pytest.mark.parametrize("kind", [nn.Sequential, Recomputed])
@pytest.mark.parametrize("method", ["pipeoptim", "pipedream", "1f1b"])
@pytest.mark.parametrize("m", [1, 4])
def test_an_outer_autocast_never_serves_stale_copies_of_weights(kind, method, m):
    """An autocast that keeps no copies at all is the oracle."""
    finals = []
    for keep, own in ((False, False), (True, False), (False, True)):
        stages = [kind(*s) for s in layers(3)]
        pipe = po.Emulator(stages, momentum, loss_fn, method, m, autocast=BF16 if own else None)
        with torch.autocast("cpu", BF16, enabled=not own, cache_enabled=keep):
            losses = [pipe.step(x, target=y) for x, y in data(8)]
            losses.append(pipe.eval_step(*data(1)[0][:1], target=data(1)[0][1], drain=False))
            pipe.drain()
            losses.append(pipe.eval_step(*data(1)[0][:1], target=data(1)[0][1]))
        finals.append((stages, torch.stack(losses)))
    for stages, losses in finals[1:]:
        assert torch.equal(losses, finals[0][1])
        assert equal(stages, finals[0][0])


def test_a_type_that_autocast_does_not_know():
    with pytest.raises(po.ConfigError, match=r"autocast is torch.float32, must be torch.bfloat16"):
        po.Emulator(layers(2), momentum, loss_fn, autocast=torch.float32)


# -- masters -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [momentum, adamw])
@pytest.mark.parametrize("m", [1, 4])
def test_masters_at_depth_1_equal_a_plain_loop_bit_for_bit(make, m):
    (ours,) = layers(1, BF16)
    plain = copy.deepcopy(ours)
    masters = [nn.Parameter(p.detach().float()) for p in plain.parameters()]
    opt = make(masters)
    pipe = po.Emulator([ours], [make(po.master_weights(ours))], loss_fn, microbatches=m)
    for x, y in data(8, dtype=BF16):
        pipe.step(x, target=y)
        for xm, ym in zip(x.chunk(m), y.chunk(m), strict=True):
            grads = torch.autograd.grad(loss_fn(plain(xm), ym) / m, list(plain.parameters()))
            for master, g in zip(masters, grads, strict=True):
                master.grad = g.float() if master.grad is None else master.grad + g.float()
        opt.step()
        opt.zero_grad()
        for p, master in zip(plain.parameters(), masters, strict=True):
            p.data.copy_(master.data)
        assert equal([ours], [plain])


def test_masters_keep_what_bfloat16_would_lose():
    """Updates of a hundredth of the rounding of a weight: in bfloat16 they vanish, with masters they add up."""
    stage = nn.Linear(1, 1, bias=False).to(BF16)
    stage.weight.data.fill_(1.0)
    pipe = po.Emulator([stage], lambda p: torch.optim.SGD(po.master_weights(stage), lr=1e-4), lambda o, t: o.sum())
    for _ in range(200):
        pipe.step(torch.ones(1, 1, dtype=BF16))
    assert stage.weight.item() == torch.tensor(1 - 200 * 1e-4).to(BF16).item() < 1


class MasterOracle:
    """A stage of ``pipeoptim_stash`` or ``pipedream`` by the book: every version of the masters in a list."""

    def __init__(self, module, predicts, lr, mu):
        self.module, self.predicts, self.lr, self.mu = module, predicts, lr, mu
        self.versions = [[p.detach().float() for p in module.parameters()]]
        self.buffers = [[torch.zeros_like(w) for w in self.versions[0]]]

    def weights(self, version, gap):
        s = gap if self.predicts else 0
        pairs = zip(self.versions[version], self.buffers[version], strict=True)
        exact = [torch.add(w, b, alpha=-self.lr * s) if s else w for w, b in pairs]
        return [w.to(BF16).requires_grad_() for w in exact]

    def run(self, weights, x):
        names = [name for name, _ in self.module.named_parameters()]
        return torch.func.functional_call(self.module, dict(zip(names, weights, strict=True)), x)

    def update(self, grads):
        first = len(self.versions) == 1
        old = self.buffers[-1]
        new = [g.clone() if first else b * self.mu + g for b, g in zip(old, grads, strict=True)]
        self.buffers.append(new)
        self.versions.append([torch.add(w, b, alpha=-self.lr) for w, b in zip(self.versions[-1], new, strict=True)])


@pytest.mark.parametrize(("method", "predicts"), [("pipedream", False), ("pipeoptim_stash", True)])
@pytest.mark.parametrize("m", [1, 2])
def test_masters_in_a_pipeline_equal_an_oracle_with_all_versions(method, predicts, m):
    depth, lr, mu = 3, 0.1, 0.9
    stages = layers(depth, BF16)
    oracles = [MasterOracle(copy.deepcopy(s), predicts, lr, mu) for s in stages]
    opts = [torch.optim.SGD(po.master_weights(s), lr=lr, momentum=mu) for s in stages]
    pipe = po.Emulator(stages, opts, loss_fn, method, m)
    for n, (x, y) in enumerate(data(7, dtype=BF16)):
        pipe.step(x, target=y)
        sums = [None] * depth
        for j, (xm, ym) in enumerate(zip(x.chunk(m), y.chunk(m), strict=True)):
            i, value, used = n * m + j, xm, []
            for k, stage in enumerate(oracles):
                at = max(0, i - (depth - 1 - k)) // m
                weights = stage.weights(at, n - at)
                inputs = value.detach().requires_grad_(k > 0)
                value = stage.run(weights, inputs)
                used.append((weights, inputs, value))
            loss, grad = loss_fn(value, ym) / m, None
            for k in reversed(range(depth)):
                weights, inputs, output = used[k]
                wanted = [*weights, inputs] if k > 0 else weights
                found = torch.autograd.grad(loss if grad is None else output, wanted, grad)
                grad = found[-1] if k > 0 else None
                part = [g.float() for g in found[: len(weights)]]
                sums[k] = part if sums[k] is None else [a + b for a, b in zip(sums[k], part, strict=True)]
        for stage, grads in zip(oracles, sums, strict=True):
            stage.update(grads)
    pipe.drain()
    for k, stage in enumerate(oracles):
        for master, p, w in zip(opts[k].param_groups[0]["params"], stages[k].parameters(), stage.versions[-1], strict=True):
            torch.testing.assert_close(master.detach(), w, rtol=1e-6, atol=1e-7)
            assert torch.equal(p, master.to(BF16))


@pytest.mark.parametrize("prediction", ["refined", "displacement"])
def test_predictions_are_written_in_the_compute_type(prediction):
    """What F sees is the float32 prediction rounded once, and the bytes are those of two low copies and one master."""
    stages = layers(3, BF16)
    optimizers = [momentum(po.master_weights(s)) for s in stages]
    masters = optimizers[0].param_groups[0]["params"]
    seen = []
    stages[0].register_forward_pre_hook(lambda mod, args: seen.append([p.detach().clone() for p in mod.parameters()]))
    pipe = po.Emulator(stages, optimizers, loss_fn, prediction=prediction)
    history = [[w.detach().clone() for w in masters]]
    for n, (x, y) in enumerate(data(8, dtype=BF16)):
        pipe.step(x, target=y)
        if pipe.version(0) == len(history):
            history.append([w.detach().clone() for w in masters])
        t = max(0, n - 2)
        for w, now, before in zip(seen[n], history[t], history[max(0, t - 1)], strict=True):
            expected = now + pipe.program.gap(0, n) * (now - before)
            torch.testing.assert_close(w, expected.to(BF16), rtol=2**-7, atol=1e-6)
    count = sum(p.numel() for p in stages[0].parameters())
    assert pipe.weight_bytes(0) == count * (2 + 2 + 4 + (4 if prediction == "displacement" else 0))
    assert pipe.weight_bytes(2) == count * (2 + 4)


@pytest.mark.parametrize("prediction", ["refined", "displacement"])
@pytest.mark.parametrize("make", [momentum, adamw, lambda p: torch.optim.SGD(p, lr=0.1)])
def test_a_checkpoint_with_masters_resumes_exactly(make, prediction):
    def build():
        stages = layers(3, BF16)
        optimizers = [make(po.master_weights(s)) for s in stages]
        return stages, optimizers, po.Emulator(stages, optimizers, loss_fn, "pipeoptim", 2, prediction=prediction)

    stages, optimizers, pipe = build()
    for n, (x, y) in enumerate(data(12, dtype=BF16)):
        pipe.step(x, target=y)
        if n == 5:
            pipe.drain()
            states = copy.deepcopy([pipe.stage_state_dict(k) for k in range(3)])
    pipe.drain()
    resumed, others, again = build()
    for k in range(3):
        again.load_stage_state_dict(k, states[k])
    for x, y in data(12, dtype=BF16)[6:]:
        again.step(x, target=y)
    again.drain()
    assert equal(stages, resumed)
    for a, b in zip(optimizers, others, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a.param_groups[0]["params"], b.param_groups[0]["params"], strict=True))
    plain = make([nn.Parameter(p.detach().float()) for p in stages[0].parameters()])
    plain.load_state_dict(states[0]["optimizer"])  # the form is the one of torch's optimizer over float32 weights


def test_parameters_that_are_wide_already_are_their_own_masters():
    stage = nn.Sequential(nn.Linear(2, 2).to(BF16), nn.LayerNorm(2))
    masters = po.master_weights(stage)
    assert [m is p for m, p in zip(masters, stage.parameters(), strict=True)] == [False, False, True, True]


# -- loss scaling ------------------------------------------------------------------------------------------------------


def scaler(scale=2.0**10, interval=3):
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=interval)


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_depth_1_equals_torchs_scaler_bit_for_bit_through_overflows(m, clip):
    ours = layers(1)
    plain = copy.deepcopy(ours[0])
    opt, theirs = adamw(plain.parameters()), scaler(2.0**22)
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
    own = scaler(2.0**22)
    rates = lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9)  # noqa: E731
    pipe = po.Emulator(ours, adamw, loss_fn, "pipeoptim", m, schedulers=rates, autocast=torch.float16, scaler=[own], clip=clip)
    scales = []
    for x, y in data(24):
        pipe.step(x, target=y)
        for xm, ym in zip(x.chunk(m), y.chunk(m), strict=True):
            with torch.autocast("cpu", torch.float16):
                loss = loss_fn(plain(xm), ym)
            theirs.scale(loss / m).backward()
        theirs.unscale_(opt)
        if clip is not None:
            nn.utils.clip_grad_norm_(plain.parameters(), clip)
        before = theirs.get_scale()
        theirs.step(opt)
        theirs.update()
        opt.zero_grad()
        if theirs.get_scale() >= before:
            schedule.step()
        scales.append(theirs.get_scale())
        assert own.get_scale() == scales[-1]
        assert equal(ours, [plain])
    steps = [b - a for a, b in itertools.pairwise(scales)]
    assert min(steps) < 0 < max(steps), "the scale never fell, or never grew"
    assert pipe.version(0) == 24


@pytest.mark.parametrize("method", ["pipeoptim", "pipedream", "1f1b"])
@pytest.mark.parametrize("m", [1, 3])
def test_each_mini_batch_is_unscaled_with_the_scale_that_it_got(method, m):
    """Powers of two change no bit in float32, so a scale that doubles every two updates must leave no trace."""
    finals, scalers = [], [scaler(16.0, 2) for _ in range(4)]
    for given in (None, scalers):
        stages = layers(4)
        pipe = po.Emulator(stages, adamw, loss_fn, method, m, scaler=given)
        for x, y in data(20, batch=6):
            pipe.step(x, target=y)
        pipe.drain()
        finals.append(stages)
    assert equal(*finals)
    assert scalers[3].get_scale() == 16.0 * 2**10


class Overflow(nn.Module):
    """Its gradient is infinite at the given calls."""

    def __init__(self, at):
        super().__init__()
        self.at, self.calls = at, 0

    def forward(self, x):
        self.calls += 1
        if self.calls in self.at and x.requires_grad:
            x = x * 1
            x.register_hook(lambda g: g + float("inf"))
        return x


def overflowing(clip=None, m=1, kind="refined"):
    """Stage 0 alone overflows, in mini-batches 4 and 5; stage 0 is three updates behind."""
    stages = layers(4)
    stages[0].append(Overflow({4 * m + 1, 5 * m + 1}))
    scalers = [scaler(1024.0, 1000) for _ in stages]
    seen = []
    pipe = po.Emulator(
        stages,
        momentum,
        loss_fn,
        "pipeoptim",
        m,
        schedulers=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
        scaler=scalers,
        clip=clip,
        prediction=kind,
    )
    weights = []
    for x, y in data(14, batch=2 * m):
        pipe.step(x, target=y)
        seen.append(scalers[3].get_scale())
        weights.append(stages[0][0].weight.detach().clone())
    pipe.drain()
    return pipe, stages, seen, weights


@pytest.mark.parametrize("kind", ["refined", "displacement"])
def test_one_stage_skips_counts_and_tells_the_last_stage_once(kind):
    pipe, stages, seen, weights = overflowing(kind=kind)
    assert [pipe.version(k) for k in range(4)] == [14] * 4
    rates = [pipe.stage_state_dict(k)["scheduler"]["last_epoch"] for k in range(4)]
    assert rates == [12, 14, 14, 14], "only the stage that skipped keeps its learning rate"
    # U(4) of stage 0 is in call 7; the news leaves with F(8), and both overflows happened at the same scale.
    assert seen == [1024.0] * 8 + [512.0] * 6
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(weights)]
    assert moved == [False, False, *[True] * 4, False, False, *[True] * 5]
    assert all(torch.isfinite(p).all() for s in stages for p in s.parameters())


def test_with_the_exact_global_norm_all_stages_skip_together():
    pipe, stages, _, _ = overflowing(po.Clip(1.0, "global"), m=4)
    assert [pipe.stage_state_dict(k)["scheduler"]["last_epoch"] for k in range(4)] == [12] * 4
    assert all(torch.isfinite(p).all() for s in stages for p in s.parameters())


def test_a_delayed_norm_that_is_not_finite_is_left_out():
    pipe, stages, _, _ = overflowing(po.Clip(1.0, "global_delayed"))
    assert all(torch.isfinite(p).all() for s in stages for p in s.parameters())
    assert all(pipe.grad_norm(k) > 0 for k in range(4))


def test_loss_scaling_resumes_exactly_with_news_on_its_way():
    def build():
        stages = layers(3)
        stages[0].append(Overflow({6}))
        scalers = [scaler(64.0, 4) for _ in stages]
        return stages, scalers, po.Emulator(stages, momentum, loss_fn, scaler=scalers)

    stages, scalers, pipe = build()
    for n, (x, y) in enumerate(data(12)):
        pipe.step(x, target=y)
        if n == 5:
            pipe.drain()
            states = copy.deepcopy([pipe.stage_state_dict(k) for k in range(3)])
    pipe.drain()
    assert states[0]["scaling"]["overflowed"] > 0
    resumed, others, again = build()
    resumed[0][-1].calls = 6
    for k in range(3):
        again.load_stage_state_dict(k, states[k])
    for x, y in data(12)[6:]:
        again.step(x, target=y)
    again.drain()
    assert equal(stages, resumed)
    assert [s.get_scale() for s in scalers] == [s.get_scale() for s in others]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (scaler(), "each stage needs its own"),
        ([scaler()], "1 entries for 2 stages"),
        ([1, 2], "must be a torch.amp.GradScaler"),
    ],
)
def test_bad_scalers_are_refused(given, words):
    with pytest.raises(po.ConfigError, match=words):
        po.Emulator(layers(2), momentum, loss_fn, scaler=given)


def test_a_disabled_scaler_is_none():
    finals = []
    for given in (None, lambda: torch.amp.GradScaler("cpu", enabled=False)):
        stages = layers(2)
        pipe = po.Emulator(stages, momentum, loss_fn, scaler=given)
        for x, y in data(5):
            pipe.step(x, target=y)
        finals.append(stages)
    assert equal(*finals)
