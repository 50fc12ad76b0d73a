"""Prediction error while training, against figures computed from every weight that was ever there."""

import warnings

import pytest
import torch
from torch import nn

import pipeoptim as po
from pipeoptim.engine.stage.displacement_samples import COORDINATES, TENSORS, _displacement_products
from pipeoptim.engine.stage.prediction_monitor import WINDOW, PredictionMonitor
from pipeoptim.kernels import available
from pipeoptim.methods import Method
from pipeoptim.weights import Latest, Predicted

WIDTH = 6
loss_fn = nn.functional.mse_loss


def layers(n, width=WIDTH):
    torch.manual_seed(1)
    return [nn.Sequential(nn.Linear(width, width), nn.Tanh()).double() for _ in range(n)]


def data(n, batch=4, width=WIDTH):
    g = torch.Generator().manual_seed(0)
    return [tuple(torch.randn(batch, width, generator=g, dtype=torch.float64) for _ in "xy") for _ in range(n)]


def two_groups(params):
    weight, bias = params
    return torch.optim.AdamW([{"params": [weight]}, {"params": [bias], "lr": 0.1}], lr=0.01)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("drains", [False, True])
def test_the_figures_equal_those_of_all_weights(every, m, drains):
    depth = 4
    stages = layers(depth)
    history = {k: [[p.detach().clone() for p in s.parameters()]] for k, s in enumerate(stages)}
    seen = {k: [] for k in range(depth)}
    for k, stage in enumerate(stages):
        stage.register_forward_pre_hook(
            lambda mod, args, k=k: seen[k].append((pipe.version(k), [p.detach().clone() for p in mod.parameters()]))
        )

    def updated(k, version):
        history[k].append([p.detach().clone() for p in stages[k].parameters()])

    pipe = po.Emulator(stages, two_groups, loss_fn, "pipeoptim", m, monitor=every, on_update=updated)
    program, start, first = pipe.program, 0, 0
    checked = 0
    for n, (x, y) in enumerate(data(14)):
        pipe.step(x, target=y)
        if drains and n == 6:
            pipe.drain()
        for k in range(depth):
            for error in pipe.prediction_error(k):
                t, s = error.version - error.steps, error.steps
                assert t % every == 0
                assert error.stage == k
                index = first if error.version > start else 0
                used = [w for i, (at, w) in enumerate(seen[k]) if at == t and gap(program, k, i, drains, m) == s][-1]
                assert index == 0
                now, before = history[k][error.version][error.group], history[k][t][error.group]
                real, expected = now - before, used[error.group] - before
                together = (real * expected).sum()
                assert error.relative_error == pytest.approx(float((used[error.group] - now).norm() / real.norm()), rel=1e-9)
                if expected.norm() == 0:
                    assert error.cosine is None
                    assert error.best_scale is None
                    continue
                assert error.cosine == pytest.approx(float(together / real.norm() / expected.norm()), rel=1e-9)
                assert error.best_scale == pytest.approx(float(together / (expected * expected).sum()), rel=1e-9)
                checked += 1
    assert checked > (10 if every == 1 else 3)
    assert [error.group for error in pipe.prediction_error(0)] == [0, 1]
    assert pipe.prediction_error(depth - 1) == []


def gap(program, k, i, drains, m):
    """Steps of the i-th forward of the run; a drain after 7 mini-batches begins the order anew."""
    return program.gap(k, i - 7 * m if drains and i >= 7 * m else i)


def test_measuring_changes_nothing():
    finals = []
    for monitor in (False, 1):
        stages = layers(4)
        pipe = po.Emulator(stages, two_groups, loss_fn, monitor=monitor)
        for x, y in data(10):
            pipe.step(x, target=y)
        pipe.drain()
        finals.append(torch.cat([p.detach().flatten() for s in stages for p in s.parameters()]))
    assert torch.equal(*finals)


def test_the_sample_is_bounded_and_spread():
    sizes = [10, 200_000, 3, 5_000, *[1_000] * 40]
    weights = [torch.zeros(size) for size in sizes]
    monitor = PredictionMonitor([weights, weights[:3], []], 0)
    sample = monitor._samples[0]
    assert len(sample) <= TENSORS
    assert sum(len(where) for _, where in sample) <= COORDINATES + TENSORS
    assert 1 in [n for n, _ in sample], "the tensor with most of the weights is in the sample"
    assert all(int(where.max()) < sizes[n] for n, where in sample)
    assert sum(len(where) for _, where in monitor._samples[1]) <= COORDINATES + TENSORS
    assert monitor._samples[2] == []
    again = PredictionMonitor([weights, weights[:3], []], 0)._samples[0]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(sample, again, strict=True))


def test_small_stages_are_measured_seldomer_by_default():
    for weights, every in ((80, 1), (60, 1), (30, 2), (23, 3), (0.001, 10)):
        assert PredictionMonitor([[torch.empty(int(1e6 * weights), device="meta")]], 0, coordinates=10).every == every
    pipe = po.Emulator(layers(4), two_groups, loss_fn, monitor=True)
    versions = set()
    for x, y in data(30):
        pipe.step(x, target=y)
        versions |= {error.version - error.steps for error in pipe.prediction_error(0)}
    assert versions == {0, 10, 20}


@pytest.mark.skipif(not available(), reason="no C compiler")
def test_the_kernel_takes_what_torch_takes():
    torch.manual_seed(0)
    weights = [torch.randn(300, 400), torch.randn(7), torch.randn(40, 30).t(), torch.randn(5000)]
    halves = [w.bfloat16() for w in weights]
    monitor = PredictionMonitor([weights[:2], [], weights[3:]], 0)  # contiguous
    flat = [weights[0], weights[1], weights[3]]
    assert monitor._sampler is not None and monitor._sampler([halves[0], *flat[1:]]) is None
    samples = [[w + n * torch.randn_like(w) for w in flat] for n in range(3)]
    taken = [monitor._sampler(sample) for sample in samples]
    for sample, found in zip(samples, taken, strict=True):
        assert torch.equal(found, torch.cat([sample[n].take(where) for n, where in monitor._places]))
    torch.testing.assert_close(
        torch.tensor(monitor._sampler.products(*taken)), _displacement_products(*taken, monitor._group_slices).float()
    )
    strided = PredictionMonitor([weights], 0)
    assert strided._sampler(weights) is None
    expected = torch.cat([weights[n].take(where) for n, where in strided._places])
    assert torch.equal(strided._sample(weights), expected)


def test_a_sample_tells_the_error_of_all():
    torch.manual_seed(0)
    before = [torch.randn(300, 400), torch.randn(400)]
    move = [torch.randn_like(w) for w in before]
    now = [w + d for w, d in zip(before, move, strict=True)]
    predicted = [w + 0.5 * d + 0.1 * torch.randn_like(w) for w, d in zip(before, move, strict=True)]
    monitor = PredictionMonitor([before], 3, every=1)
    monitor.predicted(4, 2, before, predicted)
    monitor.updated(5, before)
    assert monitor.figures() == []
    monitor.updated(6, now)
    (error,) = monitor.figures()
    assert (error.stage, error.group, error.version, error.steps) == (3, 0, 6, 2)
    assert error.relative_error == pytest.approx((0.25 + 0.01) ** 0.5, rel=0.05)
    assert error.cosine == pytest.approx(0.5 / (0.25 + 0.01) ** 0.5, rel=0.05)
    assert error.best_scale == pytest.approx(0.5 / (0.25 + 0.01), rel=0.05)


class Backwards:
    """Predicts that every weight goes the other way, twice as far."""

    needs_previous = True

    def __init__(self, context):
        self.params = [p for group in context.optimizer.param_groups for p in group["params"]]

    def before_step(self, spare):
        self.before = [p.detach().clone() for p in self.params]

    def after_step(self):
        pass

    def predict_into(self, out, steps):
        for o, p, b in zip(out, self.params, getattr(self, "before", self.params), strict=True):
            o.copy_(p.detach() - 2 * steps * (p.detach() - b.detach()))

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_a_prediction_worse_than_none_is_told_once_with_stage_and_group():
    wrong = Method("wrong", "async_1f1b", Predicted(), Latest(), summary="for the test", predictor=Backwards)
    pipe = po.Emulator(layers(2), lambda p: torch.optim.Adam(p, lr=1e-4), loss_fn, wrong, monitor=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for x, y in data(1) * (2 * WINDOW + 10):
            pipe.step(x, target=y)
    (told,) = [str(w.message) for w in caught]
    assert told.startswith("the weight prediction of stage 0, parameter group 0, is worse than none: relative error")
    assert [error.worse for error in pipe.prediction_error(0)] == [True]


def test_the_warning_comes_again_after_a_recovery():
    before, now = [torch.zeros(8)], [torch.ones(8)]
    monitor = PredictionMonitor([before], 0, every=1)
    told, version = [], 0
    for error, count in ((3.0, WINDOW + 5), (0.1, 2 * WINDOW), (3.0, WINDOW + 5)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(count):
                monitor._latest = None
                monitor.predicted(version, 1, before, [torch.ones(8) * (1 + error)])
                monitor._latest = None
                version += 1
                monitor.updated(version, now)
            worse = monitor.figures()[0].worse
        told.append((len(caught), worse))
    assert told == [(1, True), (0, False), (1, True)]


def test_weights_that_do_not_move_have_no_error():
    monitor = PredictionMonitor([[torch.zeros(4)]], 0, every=1)
    monitor.predicted(0, 1, [torch.zeros(4)], [torch.ones(4)])
    monitor.updated(1, [torch.zeros(4)])
    (error,) = monitor.figures()
    assert (error.relative_error, error.cosine, error.best_scale) == (None, None, 0.0)


@pytest.mark.parametrize("given", [-1, 1.5])
def test_bad_input_is_refused(given):
    with pytest.raises(po.ConfigError, match="monitor is"):
        po.Emulator(layers(2), two_groups, loss_fn, monitor=given)
