"""Predictions from the mini-batch in progress: against an oracle in float64, and with everything that changes what a gradient is."""

import dataclasses
import math
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import oracle
import pipeoptim as po
from pipeoptim.engine.stage.gradient_so_far import GradientSoFar, InProgressPredictor
from pipeoptim.rules import PartialGradient, Predictor
from pipeoptim.weights import Predicted, UpdateProgress
from test_oracle import WIDTH, Layer, latest_at_backward

METHODS = sorted(name for name, method in po.METHODS.items() if method.predicts_by_rule)
MU, B1, B2 = 0.9, 0.9, 0.999


def seen_at(i, u):
    """Micro-batches of the coming update that the stage has had the backward of when F of micro-batch ``i`` runs."""
    return max(0, i - (u.depth - 1 - u.k)) % u.micro


def made_from(u, refresh):
    """The number of micro-batches that the prediction for ``u.i`` was made from: it is shared until ``refresh`` more are there."""
    made = None
    for i in range(u.i + 1):
        at_f = u.start + oracle.updates_before_forward(i, u.k, u.depth, u.micro)
        if at_f == u.at_f and u.start + i // u.micro - at_f == u.gap and (made is None or seen_at(i, u) - made >= refresh):
            made = seen_at(i, u)
    return made


class ClipByStage:
    """Each stage by its own norm."""

    def __init__(self, limit):
        self.limit = limit

    def factor(self, grads):
        return min(1.0, self.limit / (math.sqrt(sum(float((g**2).sum()) for g in grads)) + 1e-6)) if self.limit else 1.0

    def clipped(self, u, grads):
        """An estimate of the gradient that stage has at this use of its weights."""
        return [g * self.factor(grads) for g in grads]

    def __call__(self, t, sums):
        return [[g * self.factor(grads) for g in grads] for grads in sums]


def estimated_gradient(rule, u, refresh, clip):
    """The gradients so far and the momentum for the rest, clipped by their norm. None: nothing is known."""
    weights, state, t = u.stage.weights[u.at_f], u.stage.states[u.at_f], u.stage.states[u.at_f].get("t", 0)
    first = (u.at_f - u.start) * u.micro
    parts = [part for part in u.stage.gradients[first : first + made_from(u, refresh)] if part[0] is not None]
    share = sum(share for _, share in parts)
    value = (
        [sum(g) for g in zip(*(grads for grads, _ in parts), strict=True)] if parts else [torch.zeros_like(w) for w in weights]
    )
    if not t or rule.name == "sgd":
        if not parts:
            return None
        g = [(2 - share) * v for v in value]
    elif rule.name == "momentum":
        g = [v + (1 - share) * ((1 - MU) * m - rule.wd * w) for v, m, w in zip(value, state["m"], weights, strict=True)]
    else:
        g = [v + (1 - share) * m / (1 - B1**t) for v, m in zip(value, state["m"], strict=True)]
    return clip.clipped(u, g)


def in_progress(rule, refresh, clip):
    """W_hat of the oracle: one step of the optimizer on the estimate, the other s - 1 along its direction."""

    def predicted(u):
        weights, state = u.stage.weights[u.at_f], u.stage.states[u.at_f]
        g = estimated_gradient(rule, u, refresh, clip) if u.gap else None
        if g is None:
            return weights
        by = rule.lr * u.gap
        if rule.name == "sgd":
            return [w - by * (x + rule.wd * w) for w, x in zip(weights, g, strict=True)]
        if rule.name == "momentum":
            g = [x + rule.wd * w for x, w in zip(g, weights, strict=True)]
            return [w - by * (MU * m + x) for w, m, x in zip(weights, state.get("m") or [0 * x for x in g], g, strict=True)]
        t = state.get("t", 0) + 1
        m, v = (state.get(name) or [0 * x for x in g] for name in ("m", "v"))
        m = [(B1 * a + (1 - B1) * x) / (1 - B1**t) for a, x in zip(m, g, strict=True)]
        v = [(B2 * a + (1 - B2) * x * x) / (1 - B2**t) for a, x in zip(v, g, strict=True)]
        return [w * (1 - by * rule.wd) - by * a / (b.sqrt() + 1e-8) for w, a, b in zip(weights, m, v, strict=True)]

    return predicted


RULES = [("sgd", 0.01), ("momentum", 0.0), ("momentum", 0.01), ("adamw", 0.0), ("adamw", 0.1)]


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=25)
@given(
    depth=st.integers(1, 6),
    m=st.integers(1, 12),
    refresh=st.integers(1, 13),
    rule=st.sampled_from(RULES),
    limit=st.sampled_from([None, 0.02]),
    rows=st.integers(-2, 4),
    drains=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_emulator_equals_the_oracle(method, depth, m, refresh, rule, limit, rows, drains, seed):
    """Weights after 3 (D + 1) updates, gaps above 1 (M < D - 1) and micro-batches of unequal size included."""
    torch.manual_seed(seed)
    rule = oracle.Rule(rule[0], wd=rule[1])
    rule.torch = {"sgd": lambda params: torch.optim.SGD(params, lr=rule.lr, weight_decay=rule.wd)}.get(rule.name, rule.torch)
    stages = [Layer() for _ in range(depth)]
    initial = [[p.detach().clone() for p in s.parameters()] for s in stages]
    total = 3 * depth + 3
    segments = [depth + 1, 2, total - depth - 3] if drains else [total]
    size = max(1, m + rows)
    batches = [(torch.randn(size, WIDTH).double(), torch.randn(size, WIDTH).double()) for _ in range(total)]
    pipe = po.Emulator(
        stages,
        rule.torch,
        nn.functional.mse_loss,
        method,
        m,
        prediction="in_progress",
        refresh=refresh,
        clip=limit,
        uneven=True,
    )
    losses = oracle.feed(pipe, batches, segments)
    clipping = ClipByStage(limit)
    found = in_progress(rule, refresh, clipping)
    backward = latest_at_backward if method == "pipeoptim" else found
    expected, expected_losses = oracle.train(initial, rule, segments, batches, m, found, backward, clip=clipping)
    assert losses == pytest.approx(expected_losses, abs=1e-10, rel=0)
    for k, stage in enumerate(stages):
        for p, w in zip(stage.parameters(), expected[k].weights[-1], strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=0, atol=1e-10)


def layers(depth, width=6, dtype=torch.float32):
    torch.manual_seed(1)
    return [nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)).to(dtype) for _ in range(depth)]


def data(n, batch=8, width=6, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return [tuple(torch.randn(batch, width, generator=g).to(dtype) for _ in "xy") for _ in range(n)]


def adamw(params):
    return torch.optim.AdamW(params, lr=0.01)


def run(stages, batches, method="pipeoptim", m=4, optimizer=adamw, **options):
    """Trained weights of all stages, and the losses."""
    options = {"prediction": "in_progress", **options}
    pipe = po.Emulator(stages, optimizer, nn.functional.mse_loss, method, m, **options)
    losses = [pipe.step(x, target=y) for x, y in batches]
    pipe.drain()
    return [p.detach().clone() for stage in stages for p in stage.parameters()], losses


def same(these, those):
    return all(map(torch.equal, these, those))


def test_at_depth_1_it_is_plain_training_bit_for_bit():
    (ours,), (plain,) = layers(1), layers(1)
    weights, _ = run([ours], data(6))
    optimizer = adamw(plain.parameters())
    for x, y in data(6):
        for xm, ym in zip(x.chunk(4), y.chunk(4), strict=True):
            (nn.functional.mse_loss(plain(xm), ym) / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert same(weights, [p.detach() for p in plain.parameters()])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("depth", "m"), [(1, 2), (3, 1), (4, 4), (4, 8), (8, 4), (8, 8), (8, 14)])
def test_measured_copies_equal_the_promise(method, depth, m):
    for refresh in {1, 2, m}:
        stages = layers(depth)
        most = [0] * depth
        pipe = po.Emulator(stages, adamw, nn.functional.mse_loss, method, m, prediction="in_progress", refresh=refresh)
        for x, y in data(3 * depth // m + 4, batch=m):
            pipe.step(x, target=y)
            most = [max(most[k], pipe.weight_bytes(k)) for k in range(depth)]
        own = sum(p.nbytes for p in stages[0].parameters())
        assert [pipe.weight_copies(k) * own for k in range(depth)] == most
        assert method != "pipeoptim" or all(n <= 2 * own for n in most)
    if method == "pipeoptim_stash" and refresh == m:
        assert pipe.weight_copies(0) <= (depth + 1 if m == 1 else 3 if m == depth else 2 if m >= 2 * (depth - 1) else depth)


@pytest.mark.parametrize("refresh", [1, 2, 3, 8, 20])
def test_a_prediction_is_made_anew_after_that_many_micro_batches(refresh):
    """Stage 0 of D = M = 8 has seen c = 1 .. 7 when it forwards the 7 micro-batches that miss an update."""
    pipe = po.Emulator(layers(8), adamw, nn.functional.mse_loss, "pipeoptim", 8, prediction="in_progress", refresh=refresh)
    weights, seen = pipe.stage_worker(0).weights, []
    predictor, original = weights.predictor, weights.predictor.predict_into
    predictor.predict_into = lambda *args: seen.append(weights.progress.share_done) or original(*args)
    for n, (x, y) in enumerate(data(4)):
        seen.clear() if n == 3 else None
        pipe.step(x, target=y)
    assert seen == [c / 8 for c in range(1, 8, refresh)]


def test_all_gradients_seen_predict_the_update_itself():
    """With overlap the update of a mini-batch comes after the forward that follows its last backward: c = M, and W_hat = W(t + 1)."""
    stages = layers(3)
    pipe = po.Emulator(stages, adamw, nn.functional.mse_loss, "pipeoptim", 3, prediction="in_progress", overlap=True, clip=0.1)
    worker, checked = pipe.stage_worker(0), []
    take = worker.forward_weights.take

    def taken(i):
        chosen = take(i)
        if worker.weights.progress.share_done == 1.0:
            checked.append((worker.weights.version + 1, [t.clone() for t in chosen.copy.tensors]))
        return chosen

    worker.forward_weights.take = taken
    versions = {}
    worker.update.on_update = lambda k, version: versions.update(
        {version: [p.detach().clone() for p in stages[0].parameters()]}
    )
    for x, y in data(6, batch=3):
        pipe.step(x, target=y)
    assert len(checked) >= 4
    for version, predicted in checked:
        for w_hat, w in zip(predicted, versions[version], strict=True):
            torch.testing.assert_close(w_hat, w, rtol=1e-6, atol=1e-7)


def test_a_loss_scale_that_is_a_power_of_two_changes_nothing():
    plain, losses = run(layers(3), data(6), clip=0.1)
    scaled, others = run(layers(3), data(6), clip=0.1, scaler=lambda: torch.amp.GradScaler("cpu", init_scale=2.0**10))
    assert same(plain, scaled) and same(losses, others)


def test_an_overflow_leaves_the_predictions_finite():
    stages, batches = layers(3), data(8)
    batches[3][0][0, 0] = math.inf  # of the first micro-batch: tanh makes its loss finite, and its gradient NaN on stage 0
    weights, losses = run(stages, batches, scaler=lambda: torch.amp.GradScaler("cpu", init_scale=4.0))
    assert all(loss.isfinite() for loss in losses)
    assert all(w.isfinite().all() for w in weights)


def test_masters_in_float32_of_a_module_in_bfloat16():
    stages = layers(3, dtype=torch.bfloat16)
    pipe = po.Emulator(
        stages, [adamw(po.master_weights(s)) for s in stages], nn.functional.mse_loss, "pipeoptim", 4, prediction="in_progress"
    )
    worker, seen = pipe.stage_worker(0), []
    predictor = worker.predictor.inner.inner
    original = predictor.predict_into

    def predict_into(out, steps, known, clip):
        seen.append([k.value for k in known])
        expected = po.predict_weights(worker.optimizer, steps, kind="in_progress", in_progress=known, clip=clip)
        original(out, steps, known, clip)
        assert all(torch.equal(a, b.bfloat16()) for a, b in zip(out, expected, strict=True))

    predictor.predict_into = predict_into
    for x, y in data(5, dtype=torch.bfloat16):
        pipe.step(x, target=y)
    assert any(value is not None and value.dtype is torch.float32 for values in seen for value in values)


def test_of_a_tied_weight_the_momentum_is_all_that_is_known():
    """The gradient of a tied weight is a sum over stages, of which a stage has its own part only."""
    stages = layers(3)
    tied = [[(0, "0.weight"), (2, "0.weight")]]
    pipe = po.Emulator(stages, adamw, nn.functional.mse_loss, "pipeoptim", 4, prediction="in_progress", tied=tied)
    predictor, seen = pipe.stage_worker(0).predictor.inner, []
    original = predictor.predict_into
    predictor.predict_into = lambda out, steps, known, clip: seen.append(known) or original(out, steps, known, clip)
    for x, y in data(5):
        pipe.step(x, target=y)
    assert seen and all(known[0] is None and known[1] is not None for known in seen)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "options", [{}, {"clip": po.Clip(0.05, "global"), "refresh": 3}, {"clip": 0.05}, {"recompute": "forward"}]
)
def test_a_resumed_run_continues_bit_for_bit(method, options):
    options = {"prediction": "in_progress", "seed": 0, **options}
    make = lambda stages: po.Emulator(stages, adamw, nn.functional.mse_loss, method, 4, **options)  # noqa: E731
    stages, batches = layers(3), data(9)
    pipe = make(stages)
    for n, (x, y) in enumerate(batches):
        pipe.step(x, target=y)
        if n == 4:
            pipe.drain()
            kept = [
                torch.utils._pytree.tree_map(lambda v: v.clone() if torch.is_tensor(v) else v, pipe.stage_state_dict(k))
                for k in range(3)
            ]
    pipe.drain()
    others = layers(3)
    again = make(others)
    for k in range(3):
        again.load_stage_state_dict(k, kept[k])
    for x, y in batches[5:]:
        again.step(x, target=y)
    again.drain()
    assert same(*([p.detach() for s in found for p in s.parameters()] for found in (stages, others)))


def test_the_monitor_measures_all_predictions_of_a_version():
    errors = {}
    for prediction in ("in_progress", "refined"):
        pipe = po.Emulator(layers(4), adamw, nn.functional.mse_loss, "pipeoptim", 8, prediction=prediction, monitor=1)
        found = []
        for x, y in data(12, batch=16):
            pipe.step(x, target=y)
            found += [e.relative_error for e in pipe.prediction_error(0) if e.relative_error is not None]
        errors[prediction] = sum(found[-8:]) / 8
    assert errors["in_progress"] < errors["refined"] < 1


def test_what_cannot_take_effect_is_refused():
    def make(method="pipeoptim", optimizer=adamw, **options):
        return po.Emulator(layers(2), optimizer, nn.functional.mse_loss, method, 2, **options)

    def grouped(params):
        return torch.optim.AdamW([{"params": list(params), "prediction": "in_progress"}])

    for words, options in (
        ("refresh is 2, but predictions of the kind 'refined'", {"refresh": 2}),
        ("refresh is 1, but predictions of the kind 'none'", {"refresh": 1, "prediction": "none"}),
        ("refresh is 0, must be an integer of at least 1", {"refresh": 0, "prediction": "in_progress"}),
        ("predicts no weights", {"method": "1f1b", "prediction": "in_progress"}),
        ("predicts in a way of its own", {"method": "spectrain", "prediction": "in_progress"}),
        ("a param group predicts from the mini-batch in progress", {"optimizer": grouped}),
    ):
        with pytest.raises(po.ConfigError, match=words):
            make(**options)


@pytest.mark.parametrize(("depth", "m", "refresh"), [(4, 4, 1), (4, 4, 2), (3, 6, 1), (2, 5, 3)])
def test_nothing_is_predicted_in_vain(depth, m, refresh, monkeypatch):
    """One prediction for each stale micro-batch, or for `refresh` of them: those of stage k are D-1-k of a mini-batch."""
    counted = []
    real = InProgressPredictor.predict_into
    monkeypatch.setattr(InProgressPredictor, "predict_into", lambda self, *args: counted.append(1) or real(self, *args))
    stages = [nn.Linear(3, 3) for _ in range(depth)]
    options = {"method": "pipeoptim", "microbatches": m, "prediction": "in_progress", "refresh": refresh}
    pipe = po.Emulator(stages, lambda p: torch.optim.AdamW(p), nn.functional.mse_loss, **options)
    per_step = []
    for _ in range(5):
        counted.clear()
        pipe.step(torch.randn(2 * m, 3), target=torch.randn(2 * m, 3))
        per_step.append(len(counted))
    stale = [depth - 1 - k for k in range(depth)]
    seen = [m - n for n in stale]  # micro-batches of the next update that the first stale forward of a stage knows
    expected = sum(len({(c + i) // refresh for i in range(n)}) for n, c in zip(stale, seen, strict=True))
    assert per_step[-1] == per_step[-2] == expected


def always_1(program, k, i):
    """In the order of its micro-batches, the gap of a stage tells versions apart; this does not."""
    return 1


ONE = dataclasses.replace(po.METHODS["pipeoptim"], name="one", forward=Predicted(always_1))


@pytest.mark.parametrize("method", [*METHODS, pytest.param(ONE, id="always 1")])
def test_checked_once_per_update_it_equals_checked_every_time(method, monkeypatch):
    """Whatever may change between two predictions: rates by a schedule and by hand, clipping, frozen weights, skipped updates, M."""

    def trained(growing):
        torch.manual_seed(1)
        # One weight each, so that a gradient often lies where that of the mini-batch before has lain.
        stages, counted = [nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh()) for _ in range(5)], []
        with monkeypatch.context() as patch:
            real = Predictor.predict_into
            patch.setattr(Predictor, "predict_into", lambda self, *args: counted.append(1) or real(self, *args))
            if not growing:
                patch.setattr(Predictor, "growing", None)
            schedules = lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)  # noqa: E731
            options = {"prediction": "in_progress", "schedulers": schedules, "clip": 1.0, "on_bad": "skip"}
            pipe = po.Emulator(stages, adamw, nn.functional.mse_loss, method, 6, **options)
            for n, (x, y) in enumerate(data(16, batch=12)):
                pipe.step(x, target=y * math.inf if n == 5 else y)
                pipe.stage_worker(0).optimizer.param_groups[0]["lr"] *= 1.3
                if n == 7:
                    stages[1][0].weight.requires_grad_(False)
                if n == 9:
                    pipe.set_microbatches(3)
            pipe.drain()
        return [p.detach().clone() for stage in stages for p in stage.parameters()], len(counted)

    once, fewer = trained(growing=True)
    every_time, all_of_them = trained(growing=False)
    assert same(once, every_time)
    assert fewer < 0.7 * all_of_them


def test_after_an_update_it_is_checked_anew_though_gradients_lie_where_they_did():
    layer = nn.Linear(4, 4)
    optimizer, params = adamw(layer.parameters()), [*layer.parameters()]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    progress, nothing_found = UpdateProgress(4, 1), types.SimpleNamespace(found="", looks=False)
    rules = Predictor(optimizer, kind="in_progress")
    predictor = InProgressPredictor(rules, GradientSoFar(params, progress, [], None, None, nothing_found))
    out, again = ([torch.empty_like(p) for p in params] for _ in "ab")
    for lr in (0.01, 0.1):
        progress.begin()
        optimizer.param_groups[0]["lr"] = lr
        for seen in (0.25, 0.5):
            progress.note_backward(None)
            predictor.predict_into(out, 1)
            rules.predict_into(again, 1, [PartialGradient(p.grad, seen) for p in params])
            assert same(out, again)
