"""What the emulator promises, each against something independent of it."""

import copy
import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_leaves

import pipeoptim as po
from pipeoptim.errors import PipeOptimError
from pipeoptim.methods import Method, gap
from pipeoptim.optim import SpikeCompensation
from pipeoptim.weights import Latest, Stashed

loss_fn = nn.functional.mse_loss
METHODS = sorted(po.METHODS)


def layers(n, width=6, dtype=torch.float32):
    return [nn.Sequential(nn.Linear(width, width, dtype=dtype), nn.Tanh()) for _ in range(n)]


def data(n, batch=8, width=6, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(batch, width, generator=g, dtype=dtype), torch.randn(batch, width, generator=g, dtype=dtype))
        for _ in range(n)
    ]


def momentum(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def adamw(params):
    return torch.optim.AdamW(params, lr=0.01)


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def fits(method, depth, m):
    return not (po.METHODS[method].at_least_depth_microbatches and m < depth)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [momentum, adamw])
@pytest.mark.parametrize("m", [1, 4])
def test_depth_1_equals_plain_pytorch_bit_for_bit(method, make, m):
    torch.manual_seed(1)
    ours = nn.Sequential(*layers(2), nn.Linear(6, 6), nn.BatchNorm1d(6))
    plain = copy.deepcopy(ours)
    opt = make(plain.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(opt, 3, gamma=0.5)
    pipe = po.Emulator([ours], make, loss_fn, method, m, schedulers=lambda o: torch.optim.lr_scheduler.StepLR(o, 3, gamma=0.5))
    for x, y in data(10):
        loss = pipe.step(x, target=y)
        total = 0.0
        for xm, ym in zip(x.chunk(m), y.chunk(m), strict=True):
            part = loss_fn(plain(xm), ym)
            (part / m).backward()
            total += part.detach() / m
        opt.step()
        schedule.step()
        opt.zero_grad()
        torch.testing.assert_close(loss, total)
        assert equal(ours, plain)
    pipe.drain()
    assert equal(ours, plain)


@pytest.mark.parametrize("method", [name for name in METHODS if po.METHODS[name].program(2, 8).flushes])
@settings(max_examples=20)
@given(depth=st.integers(1, 8), m=st.integers(1, 8), make=st.sampled_from([momentum, adamw]))
def test_flush_methods_equal_gradient_accumulation(method, depth, m, make):
    torch.manual_seed(2)
    stages = layers(depth)
    plain = nn.Sequential(*copy.deepcopy(stages))
    opt = make(plain.parameters())
    pipe = po.Emulator(stages, make, loss_fn, method, m)
    for x, y in data(4, batch=2 * m):
        loss = pipe.step(x, target=y)
        expected = loss_fn(plain(x), y)
        expected.backward()
        opt.step()
        opt.zero_grad()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
        for p, q in zip(nn.Sequential(*stages).parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def live_weight_bytes(shape_bytes):
    """Bytes of all live float storages of exactly the size of a stage's weights, found by asking the garbage collector."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        # Other tests of the same process may have left sparse tensors, which have no storage.
        if type(thing) in (torch.Tensor, nn.Parameter) and thing.layout is torch.strided:
            storage = thing.untyped_storage()
            if storage.nbytes() == shape_bytes:
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("m", [1, 8])
def test_weight_bytes_at_depth_8_by_walking_live_storages(method, m):
    depth, width = 8, 37  # a size that no activation has
    if not fits(method, depth, m):
        pytest.skip("needs more micro-batches")
    stages = [nn.Linear(width, width, bias=False) for _ in range(depth)]
    own = width * width * 4
    # plain SGD keeps no state of the size of the weights, momentum would keep one
    pipe = po.Emulator(stages, lambda p: torch.optim.SGD(p, lr=1e-3), loss_fn, method, m)
    peaks = [0] * depth
    for x, y in data(2 * depth + 2, batch=8, width=width):
        pipe.step(x, target=y)
        for k in range(depth):
            peaks[k] = max(peaks[k], pipe.weight_bytes(k))
    for k in range(depth):
        assert peaks[k] == pipe.weight_copies(k) * own
        if method == "pipedream" and m == 1:
            assert peaks[k] == (depth - k) * own
        if method == "pipeoptim":
            assert peaks[k] <= 2.02 * own
    if m == 1:
        # Everything of that size that is alive: the weights and their copies, and the last gradients that a prediction of
        # plain SGD needs. No state of an optimizer, no forgotten copy.
        gradients = sum(own for k in range(depth) if by_rule(po.METHODS[method]) and k < depth - 1)
        smoothed = sum(t.nbytes for t in smoothed_by_the_method(pipe))
        assert live_weight_bytes(own) == sum(pipe.weight_bytes(k) for k in range(depth)) + gradients + smoothed


def by_rule(method):
    """Whether the forward's weights are predicted by the optimizer's own rule."""
    return method.forward.predicts and method.predictor is None


def smoothed_by_the_method(pipe):
    """The averages that SpecTrain, XPipe and PipeMare keep beside the weights."""
    states = [getattr(worker.predictor, "state", {}) for worker in map(pipe.stage_worker, pipe.local_stages)]
    return [t for state in states for tensors in state.values() for t in tensors]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("depth", "m"), [(1, 2), (4, 1), (4, 4), (5, 7)])
def test_the_gap_counted_at_run_time_is_the_gap_promised(method, depth, m):
    """Updates between F and B of each micro-batch, counted in the modules themselves as they run."""
    if not fits(method, depth, m):
        pytest.skip("needs more micro-batches")
    stages = layers(depth)
    pipe = po.Emulator(stages, momentum, loss_fn, method, m)
    at_forward = [[] for _ in stages]
    gaps = [[] for _ in stages]
    for k, stage in enumerate(stages):
        stage[0].register_forward_hook(lambda *_, k=k: at_forward[k].append(pipe.version(k)))
        stage[0].register_full_backward_hook(lambda *_, k=k: gaps[k].append(pipe.version(k) - at_forward[k][len(gaps[k])]))
    for x, y in data(3 * depth, batch=m):
        x.requires_grad_()  # so that stage 0 has a backward hook to call
        pipe.step(x, target=y)
    pipe.drain()
    for k in range(depth):
        assert len(gaps[k]) == 3 * depth * m
        assert gaps[k] == [pipe.program.gap(k, i) for i in range(3 * depth * m)]
        assert gaps[k][-m:] == [pipe.version_gap(k, j) for j in range(m)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("depth", "m"), [(1, 2), (4, 1), (4, 4), (3, 2), (5, 7)])
def test_the_gap_of_the_table_is_that_of_the_weights_really_used(method, depth, m):
    """Which version a forward ran on, found by comparing the weights in the module with all versions there were.

    Predictions are switched off (kind "none"; SpecTrain's and XPipe's averages stay zero), so F runs on what it predicts from.
    """
    if not fits(method, depth, m):
        pytest.skip("needs more micro-batches")
    torch.manual_seed(3)
    stages = [nn.Linear(6, 6) for _ in range(depth)]
    pipe = po.Emulator(stages, lambda p: torch.optim.SGD(p, lr=0.05), loss_fn, method, m, prediction="none")
    for worker in map(pipe.stage_worker, pipe.local_stages):
        if worker.predictor is not None and hasattr(worker.predictor, "absorb"):
            worker.predictor.absorb = lambda state, gradient: None
    history = [[stage.weight.detach().clone()] for stage in stages]
    used = [[] for _ in stages]
    found = [[] for _ in stages]

    def forwarded(stage, args, k):
        (version,) = [n for n, w in enumerate(history[k]) if torch.equal(w, stage.weight)]
        used[k].append(version)

    def gave_back(*_, k):
        found[k].append(pipe.version(k) - used[k][len(found[k])])

    def updated(optimizer, *_, k):
        history[k].append(stages[k].weight.detach().clone())

    for k, stage in enumerate(stages):
        stage.register_forward_pre_hook(lambda stage, args, k=k: forwarded(stage, args, k))
        stage.register_full_backward_hook(lambda *_, k=k: gave_back(k=k))
        pipe.stage_worker(k).optimizer.register_step_post_hook(lambda *a, k=k: updated(*a, k=k))
    for x, y in data(3 * depth, batch=m):
        pipe.step(x.requires_grad_(), target=y)
    pipe.drain()
    for k in range(depth):
        assert found[k][-m:] == [gap(po.METHODS[method], depth, m, k, j) for j in range(m)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("depth", [1, 2, 3, 8])
@pytest.mark.parametrize("m", [1, 2, 4, 8])
def test_measured_copies_equal_the_promise(method, depth, m):
    stages = layers(depth)
    if not fits(method, depth, m):
        with pytest.raises(po.ConfigError, match="at least as many micro-batches as stages"):
            po.Emulator(stages, momentum, loss_fn, method, m)
        return
    pipe = po.Emulator(stages, momentum, loss_fn, method, m)
    for x, y in data(2 * depth + 2, batch=8):
        assert torch.isfinite(pipe.step(x, target=y))
    for k, stage in enumerate(stages):
        own = sum(p.untyped_storage().nbytes() for p in stage.parameters())
        assert pipe.weight_bytes(k) == pipe.weight_copies(k) * own


class Signs(torch.optim.Optimizer):
    """A third-party optimizer that the library has no rule for."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.01})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad.sign())


@pytest.mark.parametrize("m", [1, 2, 8])
def test_the_fallback_keeps_two_copies_and_predicts_the_last_displacement(m):
    depth = 4
    stages = layers(depth, dtype=torch.float64)
    pipe = po.Emulator(stages, Signs, loss_fn, "pipeoptim", m)
    seen = []
    stages[0].register_forward_pre_hook(lambda mod, args: seen.append([p.detach().clone() for p in mod.parameters()]))
    history = [[p.detach().clone() for p in stages[0].parameters()]]
    for x, y in data(8, dtype=torch.float64):
        version = pipe.version(0)
        pipe.step(x, target=y)
        if pipe.version(0) > version:
            history.append([p.detach().clone() for p in stages[0].parameters()])
    program = pipe.program
    for i, used in enumerate(seen):
        t, s = max(0, i - depth + 1) // m, program.gap(0, i)
        before = history[max(0, t - 1)]
        for w, now, previous in zip(used, history[t], before, strict=True):
            torch.testing.assert_close(w, now + s * (now - previous), rtol=0, atol=1e-12)
    for k, stage in enumerate(stages):
        assert pipe.weight_bytes(k) <= 2 * sum(p.nbytes for p in stage.parameters())


def test_dropout_of_one_stage_does_not_depend_on_other_draws():
    finals = []
    for noise in (0, 5):
        torch.manual_seed(4)
        stages = [nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)) for _ in range(3)]
        pipe = po.Emulator(stages, momentum, loss_fn, seed=11)
        for x, y in data(6):
            torch.rand(noise)
            pipe.step(x, target=y)
        pipe.drain()
        finals.append(torch.cat([p.detach().flatten() for s in stages for p in s.parameters()]))
    assert torch.equal(*finals)
    before = torch.get_rng_state()
    pipe.step(*data(1)[0][:1], target=data(1)[0][1])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("method", METHODS)
def test_eval_step(method):
    torch.manual_seed(5)
    stages = [nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)) for _ in range(3)]
    m = 4
    pipe = po.Emulator(stages, momentum, loss_fn, method, m)
    batches = data(5)
    for x, y in batches:
        pipe.step(x, target=y)
    x, y = batches[0]
    in_flight = pipe.eval_step(x, target=y, drain=False)
    model = nn.Sequential(*stages)
    assert torch.equal(in_flight, loss_fn(model.eval()(x), y).detach())
    model.train()
    drained = pipe.eval_step(x, target=y)
    assert {pipe.version(k) for k in range(3)} == {5}
    assert torch.equal(drained, loss_fn(model.eval()(x), y).detach())
    assert not drained.requires_grad


def test_evaluation_in_flight_changes_nothing():
    finals = []
    for evaluate in (False, True):
        torch.manual_seed(5)
        stages = [nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)) for _ in range(3)]
        pipe = po.Emulator(stages, momentum, loss_fn, seed=0)
        for x, y in data(7):
            pipe.step(x, target=y)
            if evaluate:
                pipe.eval_step(x, target=y, drain=False)
        pipe.drain()
        finals.append(torch.cat([p.detach().flatten() for s in stages for p in s.parameters()]))
    assert torch.equal(*finals)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [momentum, adamw, Signs, lambda p: torch.optim.SGD(p, lr=0.1)])
def test_resuming_from_a_drained_boundary_is_exact(method, make):
    if make is Signs and po.METHODS[method].compensation is SpikeCompensation:
        with pytest.raises(po.ConfigError, match="not that of Signs"):
            po.Emulator(layers(3), make, loss_fn, method, 4)
        return

    def build():
        torch.manual_seed(6)
        stages = [nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.3)) for _ in range(3)]
        schedules = lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9)  # noqa: E731
        return stages, po.Emulator(stages, make, loss_fn, method, 4, schedulers=schedules, seed=1)

    batches = data(12)
    stages, pipe = build()
    for n, (x, y) in enumerate(batches):
        pipe.step(x, target=y)
        if n == 5:
            pipe.drain()
            states = copy.deepcopy([pipe.stage_state_dict(k) for k in range(3)])
    pipe.drain()
    torch.manual_seed(99)
    resumed, again = build()
    for k in range(3):
        again.load_stage_state_dict(k, states[k])
    for x, y in batches[6:]:
        again.step(x, target=y)
    again.drain()
    assert again.version(0) == 12
    for k in range(3):
        assert equal(stages[k], resumed[k])
        plain = [leaf for leaf in tree_leaves(states[k]) if not isinstance(leaf, torch.Tensor)]
        assert all(isinstance(leaf, (int, float, str, bool, type(None))) for leaf in plain), plain


def test_state_in_mid_flight_is_refused():
    pipe = po.Emulator(layers(2), momentum, loss_fn)
    pipe.step(*data(1)[0][:1], target=data(1)[0][1])
    with pytest.raises(PipeOptimError, match=r"call drain\(\) first"):
        pipe.stage_state_dict(0)


class Split(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x):
        return self.a(x), None, {"mask": x > 0, "scale": 2.0}, x.detach()


class Join(nn.Module):
    def __init__(self):
        super().__init__()
        self.b = nn.Linear(6, 6)

    def forward(self, h, nothing, extra, x):
        assert nothing is None
        return self.b(h * extra["mask"] * extra["scale"] + x)


def test_nested_outputs_without_gradients_and_stages_without_parameters():
    torch.manual_seed(8)
    stages = [Split(), Join(), nn.Tanh()]
    plain = copy.deepcopy(stages)
    pipe = po.Emulator(stages, momentum, loss_fn, "1f1b", 2)
    opt = momentum([p for s in plain for p in s.parameters()])
    for x, y in data(3):
        pipe.step(x, target=y)
        loss_fn(plain[2](plain[1](*plain[0](x))), y).backward()
        opt.step()
        opt.zero_grad()
    for a, b in zip(stages, plain, strict=True):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(p, q)


def test_in_place_modules_at_the_border_of_a_stage():
    torch.manual_seed(9)
    blocks = [nn.Linear(6, 6), nn.ReLU(inplace=True), nn.BatchNorm1d(6), nn.ELU(inplace=True), nn.Linear(6, 6)]
    plain = copy.deepcopy(blocks)
    stages = [blocks[0], nn.Sequential(*blocks[1:3]), nn.Sequential(*blocks[3:])]
    pipe = po.Emulator(stages, momentum, loss_fn, "gpipe")
    opt = momentum([p for s in plain for p in s.parameters()])
    for x, y in data(4):
        pipe.step(x, target=y)
        loss_fn(nn.Sequential(*plain)(x), y).backward()
        opt.step()
        opt.zero_grad()
    for a, b in zip(blocks, plain, strict=True):
        for (name, p), q in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
            assert torch.equal(p, q), name


def test_a_method_of_ones_own():
    mine = Method("mine", order="async_1f1b", forward=Latest(), backward=Stashed(), summary="as PipeDream")
    finals = []
    for method in (mine, "pipedream"):
        torch.manual_seed(10)
        stages = layers(3)
        pipe = po.Emulator(stages, momentum, loss_fn, method)
        for x, y in data(6):
            pipe.step(x, target=y)
        finals.append(torch.cat([p.detach().flatten() for s in stages for p in s.parameters()]))
    assert torch.equal(*finals)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: po.Emulator([], momentum, loss_fn), "stages is empty"),
        (lambda: po.Emulator(layers(2), [momentum(layers(1)[0].parameters())], loss_fn), "1 entries for 2 stages"),
        (lambda: po.Emulator(layers(1), [momentum(layers(1)[0].parameters())], loss_fn), "not in the stage's module"),
        (lambda: po.Emulator(layers(1), lambda p: torch.optim.LBFGS(p), loss_fn), "LBFGS"),
        (lambda: po.Emulator(layers(2), momentum, loss_fn, "pipeoptimm"), "did you mean 'pipeoptim'"),
        (lambda: po.Emulator(layers(2), momentum, loss_fn, microbatches=0), "microbatches is 0"),
        (lambda: po.Emulator(layers(2), momentum, loss_fn).version(2), r"stages 0 \.\. 1 exist"),
        (lambda: po.Emulator(layers(2), momentum, loss_fn, microbatches=3).step(torch.ones(4, 6)), "multiple of 3"),
        (lambda: po.Emulator(layers(2), momentum, lambda a, b: a - b).step(torch.ones(4, 6), target=1), r"shape \(4, 6\)"),
        (
            lambda: po.Emulator(layers(2), momentum, lambda a, b: loss_fn(a, b).detach()).step(
                torch.ones(4, 6), target=torch.ones(4, 6)
            ),
            "does not depend on any weight",
        ),
        (lambda: po.Emulator(layers(2), momentum, loss_fn).step(torch.ones(0, 6), target=torch.ones(0, 6)), "have no rows"),
        (lambda: po.Emulator(layers(2), momentum, loss_fn).eval_step(torch.ones(0, 6)), "have no rows"),
        (lambda: po.Emulator(layers(2), momentum, loss_fn).step(torch.ones(4, 6), stage_kwargs=[1]), "stage_kwargs is a list"),
        (lambda: po.Emulator(nn.Linear(6, 6), momentum, loss_fn), "must be a list of modules"),
        (lambda: po.Emulator([1, 2], momentum, loss_fn), "stage 0 is a int"),
        (lambda: po.Emulator(layers(2), momentum(layers(1)[0].parameters()), loss_fn), "optimizers is one SGD for 2 stages"),
        (lambda: po.Emulator(layers(2), [momentum, None], loss_fn), "optimizer of stage 0 is a function"),
        (lambda: po.Emulator(layers(2), momentum, loss_fn, overlap="yes"), "overlap is 'yes'"),
        (lambda: po.Emulator(layers(2), momentum, loss_fn, uneven="no"), "uneven is 'no'"),
        (lambda: po.Emulator(layers(2), momentum, loss_fn, loss_weight=3), "loss_weight is 3"),
        (lambda: po.Emulator(layers(2), momentum, loss_fn, trace="t"), "trace is a str"),
        (lambda: po.Emulator(layers(2), momentum, lambda a, b: 1.0).step(torch.ones(4, 6)), "a float, must be a scalar"),
    ],
)
def test_bad_input_is_refused_with_a_sentence(make, words):
    with pytest.raises(po.ConfigError, match=words) as raised:
        make()
    assert "\n" not in str(raised.value)


def test_weights_and_pipeline_survive_a_forward_that_raises():
    torch.manual_seed(11)
    stages = layers(3)
    pipe = po.Emulator(stages, momentum, loss_fn)
    batches = data(5)
    for x, y in batches:
        pipe.step(x, target=y)
    latest = [p.detach().clone() for p in stages[0].parameters()]
    with pytest.raises(RuntimeError):
        pipe.step(torch.ones(4, 5), target=torch.ones(4, 6))
    for p, w in zip(stages[0].parameters(), latest, strict=True):
        assert torch.equal(p, w)
