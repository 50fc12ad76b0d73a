"""A loss or gradient that is not finite: training ends before a weight has moved, or the update is left out, as a plain loop would."""

import copy
import math
import statistics
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

import case
import on_bad_cases as cases
import oracle
import pipeoptim as po
import stage_processes
from test_in_progress import ClipByStage, in_progress
from test_oracle import WIDTH, Layer, annealed, corrections, uses

HERE = Path(__file__).parent
mse = nn.functional.mse_loss


def sgd(params):
    return torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-3)


def halved(opt):
    return torch.optim.lr_scheduler.ExponentialLR(opt, 0.97)


class TensorClip:
    """AdaGC spelled out, one gradient after the other."""

    def __init__(self):
        self.updates, self.means = 0, {}

    def __call__(self, params):
        known, self.updates = cases.ADAGC, self.updates + 1
        grads = {n: p.grad for n, p in enumerate(params) if p.grad is not None and p.grad.any()}
        norms = {n: g.norm() for n, g in grads.items()}
        whole = torch.stack([*norms.values()]).norm()
        for n, g in grads.items():
            mean = self.means.get(n)
            if self.updates <= known["warmup"]:
                h = torch.clamp(known["lambda_abs"] / (whole + 1e-6), max=1)
            else:
                h = torch.clamp((known["lambda_abs"] if mean is None else known["lambda_rel"] * mean) / norms[n], max=1)
            g.mul_(h)
            after = norms[n] * h
            if mean is None:
                self.means[n] = after
            elif self.updates <= known["warmup"]:
                self.means[n] = torch.minimum(mean, after)
            else:
                self.means[n] = known["beta"] * mean + (1 - known["beta"]) * after


class Stage:
    """One stage of a plain loop, with every version of its weights, and random numbers of its own."""

    def __init__(self, module, k, depth, seed, clip):
        self.clip = clip() if clip else None
        self.module, self.late = module, depth - 1 - k
        self.opt = sgd(module.parameters())
        self.rate = halved(self.opt)
        self.versions = [self.copy()]
        self.random = torch.Generator().manual_seed(seed + 1_000_003 * (k + 1)).get_state()

    def copy(self):
        return {name: p.detach().clone().requires_grad_() for name, p in self.module.named_parameters()}

    def forward(self, x, version):
        outer = torch.get_rng_state()
        torch.set_rng_state(self.random)
        before = [b.clone() for b in self.module.buffers()]
        y = functional_call(self.module, self.versions[version], (x,))
        for buffer, old in zip(self.module.buffers(), before, strict=True):
            if buffer.is_floating_point():
                buffer.data.copy_(torch.where(buffer.isfinite(), buffer, old))
        self.random = torch.get_rng_state()
        torch.set_rng_state(outer)
        return y

    def update(self, version, bad, scaler):
        if not bad:
            for name, p in self.module.named_parameters():
                p.grad = self.versions[version][name].grad
            if self.clip is not None:
                if scaler is not None:
                    scaler.unscale_(self.opt)
                self.clip([p for group in self.opt.param_groups for p in group["params"]])
            if scaler is None:
                self.opt.step()
            else:
                scaler.step(self.opt)
        for used in self.versions:
            for p in used.values():
                p.grad = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.rate.step()
        self.versions.append(self.copy())


def plain_loop(modules, m, late, scaler=None, clip=None, batches=None, loss_fn=case.loss_fn, outlier=None):
    """What stashed weights, ``late`` updates old on stage k, do with the mini-batches; late=False: a pipeline that flushes."""
    recent = []
    stages = [Stage(module, k, len(modules), 3, clip) for k, module in enumerate(modules)]
    for n, (x, y) in enumerate(batches or cases.batches(m)):
        versions = [max(0, n - stage.late) if late else n for stage in stages]
        losses = []
        for xm, ym in zip(x.chunk(m), y.chunk(m), strict=True):
            for stage, version in zip(stages, versions, strict=True):
                xm = stage.forward(xm, version)
            losses.append(loss_fn(xm, ym))
            loss = losses[-1] / m if m > 1 else losses[-1]
            (loss if scaler is None else scaler.scale(loss)).backward()
        bad = not all(loss.isfinite() for loss in losses)
        if outlier is not None and len(recent) >= 16:
            middle = statistics.median(recent)
            spread = 1.4826 * statistics.median(abs(loss - middle) for loss in recent)
            bad = bad or any(loss.item() > middle + outlier * spread for loss in losses)
        if not bad:
            recent = [*recent, *(loss.item() for loss in losses)][-64:]
        for stage, version in zip(stages, versions, strict=True):
            stage.update(version, bad, scaler)
        if scaler is not None and not bad:
            scaler.update()
    return stages


def assert_same(modules, stages):
    for k, (module, stage) in enumerate(zip(modules, stages, strict=True)):
        pairs = zip(module.state_dict().items(), stage.module.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for (_, a), b in pairs), f"stage {k} differs"
        assert all(t.isfinite().all() for t in module.state_dict().values())


@pytest.mark.parametrize(
    ("method", "depth", "m", "scaled", "clip"),
    [
        ("pipedream", 4, 1, False, None),
        ("pipedream", 4, 1, False, "adagc"),
        ("1f1b", 4, 1, False, None),
        ("1f1b", 4, 2, False, "adagc"),
        ("gpipe", 2, 2, False, None),
        ("pipeoptim", 1, 2, False, "adagc"),
        ("pipeoptim", 1, 2, True, None),
        ("pipeoptim", 1, 2, True, "adagc"),
    ],
)
def test_skipping_is_leaving_the_update_out_of_a_plain_loop_bit_for_bit(method, depth, m, scaled, clip):
    modules = case.pieces(depth)
    for layer in nn.ModuleList(modules).modules():
        if isinstance(layer, nn.ReLU):
            layer.inplace = False  # between stages a pipeline allows it, a plain loop does not
    theirs, own = (cases.scaler(), [cases.scaler()]) if scaled else (None, None)
    expected = plain_loop(copy.deepcopy(modules), m, method == "pipedream", theirs, clip and TensorClip)
    pipe = po.Emulator(
        modules,
        sgd,
        case.loss_fn,
        method,
        m,
        schedulers=halved,
        seed=3,
        on_bad="skip",
        scaler=own,
        clip=clip and po.AdaGC(**cases.ADAGC),
    )
    cases.train(pipe, lambda x, y: ([x], y), m)
    assert_same(modules, expected)
    assert [pipe.skipped(k) for k in range(depth)] == [cases.SKIPPED] * depth
    assert [pipe.version(k) for k in range(depth)] == [cases.UPDATES] * depth
    if clip:
        assert all(pipe.clipped_tensors(k) > 0 for k in range(depth)) and pipe.options.clip.warmup == 5
    if scaled:
        assert own[0].state_dict() == theirs.state_dict()


@pytest.mark.parametrize(
    ("method", "depth", "m", "scaled"),
    [("pipedream", 4, 1, False), ("1f1b", 3, 2, False), ("1f1b", 3, 2, True), ("pipeoptim", 1, 4, True), ("gpipe", 2, 1, True)],
)
def test_nan_infinity_and_a_million_at_twenty_places_are_left_out_bit_for_bit(method, depth, m, scaled):
    modules, loss_fn = cases.regressors(depth), nn.functional.mse_loss
    theirs, own = (cases.scaler(), [cases.scaler() for _ in range(depth)]) if scaled else (None, None)
    late, data = method == "pipedream", cases.regression(m)
    expected = plain_loop(copy.deepcopy(modules), m, late, theirs, None, data, loss_fn, cases.OUTLIER)
    options = {"on_bad": "skip", "outlier": cases.OUTLIER, "scaler": own}
    pipe = po.Emulator(modules, sgd, loss_fn, method, m, schedulers=halved, seed=3, **options)
    for x, y in cases.regression(m):
        pipe.step(x, target=y)
    pipe.drain()
    assert_same(modules, expected)
    assert [pipe.skipped(k) for k in range(depth)] == [list(cases.SCARS)] * depth and len(cases.SCARS) == 20


def test_an_outlier_stops_by_default_and_its_bound_is_saved():
    def pipeline():
        modules = cases.regressors(2)
        return modules, po.Emulator(modules, sgd, mse, outlier=cases.OUTLIER)

    modules, pipe = pipeline()
    found = list(cases.regression(scars={30: 1e6}))
    for x, y in found[:24]:
        pipe.step(x, target=y)
    pipe.drain()
    states = copy.deepcopy([pipe.stage_state_dict(k) for k in range(2)])
    resumed, again = pipeline()
    for k in range(2):
        again.load_stage_state_dict(k, states[k])
    for one in (pipe, again):
        with pytest.raises(po.DivergedError, match=r"an outlier: the 30 before it .* at step 31, on stage 1; no weight"):
            feed(one, found[24:])
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(weights(modules)), tree_leaves(weights(resumed)), strict=True))
    with pytest.raises(po.ConfigError, match="outlier is 0, must be a finite number above 0"):
        po.Emulator(layers(2), sgd, mse, outlier=0)


def known(u, skip):
    """Whether F of ``u`` comes when the stage has had the verdict on the update before it: with the mini-batch's first micro-batch."""
    done = max(0, u.i - oracle.ahead(u.k, u.depth))
    return bool(u.gap) and u.start + done // u.micro in skip and done % u.micro > 0


def knowing(use, skip, m):
    """``use`` with one update less to come where it is known that one will be left out."""
    return lambda u: use(replace(u, at_b=u.at_b - 1) if m > 1 and known(u, skip) else u)


@pytest.mark.parametrize(
    ("method", "m", "prediction"),
    [(method, 1, {}) for method in sorted(po.METHODS)]
    + [(method, m, {}) for method in ("pipeoptim", "pipeoptim_stash", "naive", "pipedream") for m in (2, 4)]
    + [("pipeoptim", m, {"prediction": "in_progress"}) for m in (2, 4)],
)
def test_every_method_equals_the_oracle_that_leaves_updates_out(method, m, prediction):
    depth, total, skip = 3, 14, {0, 5, 6, 10, 13}
    if po.METHODS[method].at_least_depth_microbatches:
        m = depth
    torch.manual_seed(m)
    rule = oracle.Rule("nadam") if method.startswith("nesterov") else oracle.Rule("momentum", wd=0.01)
    stages = [Layer() for _ in range(depth)]
    initial = [[p.detach().clone() for p in s.parameters()] for s in stages]
    batches = [(torch.randn(m, WIDTH).double(), torch.randn(m, WIDTH).double()) for _ in range(total)]
    for n in skip:
        batches[n][n % 2][0, 1] = math.nan if n % 2 == 0 else math.inf  # tanh makes an infinite input a finite number
    pipe = po.Emulator(stages, rule.torch, mse, method, m, on_bad="skip", **prediction)
    oracle.feed(pipe, batches, [8, total - 8])

    gammas = [0.135 ** (1 / max(1, -(-oracle.ahead(k, depth) // m))) for k in range(depth)]
    rate = annealed(depth, m, 1000) if method == "pipemare" else lambda k, version: 1.0
    forward, backward = uses(method, rule)
    if prediction:
        fresh, stale = in_progress(rule, 1, ClipByStage(None)), forward
        forward = lambda u: (stale if known(u, skip) else fresh)(u)  # noqa: E731
    forward = knowing(forward, skip, m)
    if method == "pipeoptim_stash":
        backward = forward
    given = (rate, gammas, corrections(method, depth, m, rule))
    expected, _ = oracle.train(initial, rule, [8, total - 8], batches, m, forward, backward, *given, skip=skip)
    for k, stage in enumerate(stages):
        assert set(pipe.skipped(k)) == skip
        for p, w in zip(stage.parameters(), expected[k].weights[-1], strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=0, atol=1e-10)


def layers(depth):
    torch.manual_seed(2)
    return [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(depth)]


def data(bad, n=8, value=math.nan):
    g = torch.Generator().manual_seed(3)
    found = [tuple(torch.randn(2, 4, 4, generator=g)) for _ in range(n)]
    for at in bad:
        found[at][1][0, 0] = value
    return found


def weights(modules):
    return [[p.detach().clone() for p in module.parameters()] for module in modules]


def feed(pipe, found):
    for x, y in found:
        pipe.step(x, target=y)


@pytest.mark.parametrize(("m", "method"), [(1, "pipeoptim"), (2, "pipeoptim"), (2, "gpipe")])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_stopping_names_step_and_stage_and_no_weight_has_taken_the_update(m, method, value):
    def train(batches, versions):
        modules = layers(3)
        pipe = po.Emulator(modules, sgd, mse, method, m, on_update=lambda k, v: versions.update({(k, v): weights(modules)[k]}))
        for x, y in batches:
            pipe.step(x, target=y)
        return modules, pipe

    healthy, stopped = {}, {}
    train(data([]), healthy)
    with pytest.raises(
        po.DivergedError, match=rf"^the loss is {value} at step 5, on stage 2; no weight .* mini-batch 4 \(counted"
    ):
        train(data([4], value=value), stopped)
    # All that was updated was updated by the mini-batches before, as if nothing had come after them.
    assert max(version for _, version in stopped) <= 4 < max(version for _, version in healthy)
    assert all(torch.equal(a, b) for key in stopped for a, b in zip(stopped[key], healthy[key], strict=True))


class Sick(nn.Module):
    """Its bias gets a gradient that is not a number in training forward number ``at``; what it sends back is finite."""

    def __init__(self, at):
        super().__init__()
        self.linear, self.at, self.seen = nn.Linear(4, 4), at, 0
        self.side = nn.Parameter(torch.ones(()))

    def forward(self, x):
        self.seen += 1
        side = self.side.clamp(0, 1) if self.seen != self.at else (self.side - self.side).sqrt()
        return self.linear(x) + 0 * side


@pytest.mark.parametrize(
    ("clip", "alike"),
    [(None, False), (1.0, False), (po.Clip(1.0, "global_delayed"), False), (po.Clip(math.inf, "global"), True)],
)
def test_a_gradient_is_found_by_its_own_stage_and_by_all_where_clipping_waits_for_all(clip, alike):
    def pipeline(**options):
        torch.manual_seed(0)
        modules = [layers(1)[0], Sick(2 * 3 + 1), layers(1)[0]]
        return modules, po.Emulator(modules, sgd, mse, "pipeoptim", 2, clip=clip, **options)

    modules, pipe = pipeline(on_bad="skip")
    for x, y in data([]):
        pipe.step(x, target=y)
    pipe.drain()
    assert [pipe.skipped(k) for k in range(3)] == ([[3]] * 3 if alike else [[], [3], []])
    assert all(p.isfinite().all() for stage in weights(modules) for p in stage)

    modules, pipe = pipeline()
    # Without clipping, stopping looks at losses only: that of the next mini-batch tells.
    found = r"gradients of stage \d are not finite at step 4 \(first: " if clip else "loss is nan at step 5, on stage 2"
    with pytest.raises(po.DivergedError, match=f"^the {found}"):
        feed(pipe, data([]))
    assert pipe.version(1) == (3 if clip else 4)
    assert not clip or all(p.isfinite().all() for stage in weights(modules) for p in stage)


@pytest.mark.parametrize("m", [1, 2])
def test_going_back_and_leaving_a_mini_batch_out_is_having_known_it_from_the_beginning(m):
    """A loss, an outlier, and a gradient that one stage finds when others have made their updates already."""

    def pipeline(forwards=0):
        torch.manual_seed(0)
        modules = [*layers(2), Sick(m * 5 + 1 - forwards), nn.Linear(4, 4)]
        return modules, po.Emulator(modules, sgd, mse, "pipeoptim", m, on_bad="rollback", outlier=20.0)

    def data_here():
        found = data([2], 40)
        found[30] = found[30][0], 1e4 * found[30][1]
        return found

    modules, pipe = pipeline()
    pipe.leave_out({2, 5, 30})
    feed(pipe, data_here())
    pipe.drain()
    expected, bad = weights(modules), set()
    while True:
        modules, pipe = pipeline()
        pipe.leave_out(bad)
        try:
            feed(pipe, data_here())
        except po.DivergedError as error:
            bad.add(error.mini_batch)
        else:
            break
    pipe.drain()
    assert bad == {2, 5, 30} and all(pipe.skipped(k) == sorted(bad) for k in range(4))
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(expected), tree_leaves(weights(modules)), strict=True))


def test_a_sick_gradient_does_not_make_predictions_from_it_sick():
    modules = [nn.Sequential(Sick(2 * 3 + 1), nn.Tanh()), *layers(2)]
    pipe = po.Emulator(modules, sgd, mse, "pipeoptim", 2, prediction="in_progress", on_bad="skip")
    losses = [pipe.step(x, target=y) for x, y in data([])]
    pipe.drain()
    assert [pipe.skipped(k) for k in range(3)] == [[3], [], []]
    assert all(loss.isfinite() for loss in losses)


def test_too_many_in_a_row_end_training_and_a_good_one_begins_the_count_anew():
    pipe = po.Emulator(layers(2), sgd, mse, on_bad="skip")
    for x, y in data(range(1, 11), 13):
        pipe.step(x, target=y)
    with pytest.raises(po.DivergedError, match=r"is nan at step 24, .* 10 mini-batches in a row before it, 13 to 22 \(counted"):
        feed(pipe, data(range(11), 11))


def test_a_resumed_pipeline_goes_on_counting_and_no_scheduler_warns():
    runs = []
    for drained in (False, True):
        modules = layers(2)
        pipe = po.Emulator(modules, sgd, mse, on_bad="skip", schedulers=halved)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for n, (x, y) in enumerate(data([0, 1, 4], 6)):
                pipe.step(x, target=y)
                if n == 1:
                    pipe.drain()
                    if drained:
                        states = copy.deepcopy([pipe.stage_state_dict(k) for k in range(2)])
                        modules = layers(2)
                        pipe = po.Emulator(modules, sgd, mse, on_bad="skip", schedulers=halved)
                        for k, state in enumerate(states):
                            pipe.load_stage_state_dict(k, state)
            pipe.drain()
        assert pipe.skipped(0) == pipe.skipped(1) == [0, 1, 4]
        runs.append(weights(modules))
    assert all(torch.equal(a, b) for a, b in zip(*map(tree_leaves, runs), strict=True))


@pytest.mark.parametrize("method", ["pipeoptim", "1f1b"])
def test_copies_of_a_tied_weight_stay_equal(method):
    modules = layers(3)
    modules[2].load_state_dict(modules[0].state_dict())
    pipe = po.Emulator(modules, sgd, mse, method, 2, tied=[[(0, "0.weight"), (2, "0.weight")]], on_bad="skip")
    for x, y in data([0, 3, 4], 9):
        pipe.step(x, target=y)
    pipe.drain()
    assert pipe.skipped(0) == pipe.skipped(2) == [0, 3, 4]
    assert torch.equal(modules[0][0].weight, modules[2][0].weight) and modules[0][0].weight.isfinite().all()


def test_what_cannot_be_is_refused():
    with pytest.raises(po.ConfigError, match="leave_out needs on_bad='skip' or 'rollback'"):
        po.Emulator(layers(2), sgd, mse).leave_out([3])
    with pytest.raises(po.ConfigError, match=r"mini_batches is \[-1\], must be numbers"):
        po.Emulator(layers(2), sgd, mse, on_bad="skip").leave_out([-1])
    with pytest.raises(po.ConfigError, match="on_bad is 'skp'.*did you mean 'skip'"):
        po.Emulator(layers(2), sgd, mse, on_bad="skp")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("on_bad")
    return path, stage_processes.run(HERE / "on_bad_worker.py", 2, str(path))


@pytest.mark.parametrize("name", cases.CASES)
def test_processes_equal_the_emulator_bit_for_bit(written, name):
    depth, method, m, options = cases.CASES[name]
    modules, loss_fn = cases.pieces(name)
    opts = [case.optimizer("adamw", module.parameters()) for module in modules]
    rates = [case.scheduler(opt) for opt in opts]
    processes = 2 if depth > 2 else None
    pipe = po.Emulator(
        modules, opts, loss_fn, method, m, schedulers=rates, seed=3, on_bad="skip", processes=processes, **options
    )
    losses = cases.train(pipe, lambda x, y: ([x], y), m, name)
    for k in range(depth):
        theirs = torch.load(written[0] / f"{name}-{k}.pt", weights_only=True)
        assert theirs["state"]["skipped"] == cases.skipped(name)
        pairs = zip(tree_leaves(pipe.stage_state_dict(k)), tree_leaves(theirs["state"]), strict=True)
        assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs), f"stage {k} differs"
    torch.testing.assert_close(torch.stack(losses), torch.stack(theirs["losses"]), rtol=0, atol=0, equal_nan=True)


def test_in_processes_the_last_stage_stops_and_the_other_says_why(written):
    first, last = written[1]
    assert "DivergedError: the loss is nan at step 1, on stage 1; no weight has taken that update" in last
    assert "version 0" in first and "version 0" in last and "StageFailure" in first
