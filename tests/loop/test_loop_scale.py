"""``scale="auto"``: predictions multiplied by what would have been right, against sums made from every weight that was ever there."""

import copy
import statistics
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

import pipeoptim as po
from pipeoptim.compare.plan import plan_comparison
from pipeoptim.compare.report import write_run_report
from pipeoptim.compare.settings import ComparisonSettings
from pipeoptim.engine.stage.prediction_scale import EVERY, KEPT, LARGEST, LEAST
from pipeoptim.rules import KINDS
from pipeoptim.telemetry.prediction_advice import advice
from pipeoptim.telemetry.summary import print_summary
from pipeoptim.train import run
from test_loop_train import config, rows

WIDTH, DEPTH = 6, 4
loss_fn = nn.functional.mse_loss
PREDICTS = [kind for kind in KINDS if kind != "none"]


def layers(dtype=torch.float64):
    torch.manual_seed(1)
    return [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()).to(dtype) for _ in range(DEPTH)]


def data(n, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return [tuple(torch.randn(4, WIDTH, generator=g, dtype=torch.float64).to(dtype) for _ in "xy") for _ in range(n)]


def two_groups(params):
    weight, bias = params
    return torch.optim.AdamW([{"params": [weight]}, {"params": [bias], "lr": 0.03}], lr=0.01)


@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("kind", PREDICTS)
def test_the_scale_is_the_least_squares_best_of_all_that_was_measured(kind, m):
    """A stage has few weights, so that the sample is all of them."""
    stages = layers()
    history = {k: [[p.detach().clone() for p in s.parameters()]] for k, s in enumerate(stages)}
    made = {k: {} for k in range(DEPTH)}  # (t + s, s) -> W_t, scales, predictions
    count = dict.fromkeys(range(DEPTH), 0)
    sums = {k: [(0.0, 0.0)] * 2 for k in range(DEPTH)}
    told = {k: [] for k in range(DEPTH)}

    def forward(k, module):
        i, t = count[k], pipe.version(k)
        count[k], s = i + 1, pipe.program.gap(k, i)
        if s and t % EVERY == 0:
            _, _, predictions = made[k].setdefault((t + s, s), (history[k][t], pipe.prediction_scales(k), []))
            used = [p.detach().clone() for p in module.parameters()]
            if not any(all(map(torch.equal, used, other)) for other in predictions):
                predictions.append(used)

    def updated(k, version):
        expected = [min(LARGEST, max(LEAST, ab / aa)) if aa else 1.0 for ab, aa in sums[k]]
        if k < DEPTH - 1:
            assert pipe.prediction_scales(k) == pytest.approx(expected, rel=1e-6)
            told[k].append(expected)
        history[k].append([p.detach().clone() for p in stages[k].parameters()])
        for target, s in [key for key in made[k] if key[0] == version]:
            before, scales, predictions = made[k].pop((target, s))
            for g in range(2):
                a = [(w[g] - before[g]) / scales[g] for w in predictions]
                b = history[k][version][g] - before[g]
                ab, aa = sum(float((x * b).sum()) for x in a), sum(float((x * x).sum()) for x in a)
                sums[k][g] = (KEPT * sums[k][g][0] + ab, KEPT * sums[k][g][1] + aa)

    for k, stage in enumerate(stages):
        stage.register_forward_pre_hook(lambda module, args, k=k: forward(k, module))
    pipe = po.Emulator(stages, two_groups, loss_fn, "pipeoptim", m, prediction=kind, scale="auto", on_update=updated)
    for x, y in data(40):
        pipe.step(x, target=y)
    assert pipe.prediction_scales(DEPTH - 1) == []
    assert len({tuple(scales) for scales in told[0]}) > 3 and told[0][-1][0] != told[0][-1][1]


def follow(signs, scale="auto"):
    """Stage 0 of two, whose gradient is ``signs[n]`` times a constant; the scale and the relative error after each mini-batch."""
    torch.manual_seed(2)
    stages = [nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)]
    pipe = po.Emulator(
        stages, lambda p: torch.optim.SGD(p, lr=1e-4), lambda out, sign: (out * sign).mean(), scale=scale, monitor=1
    )
    x, found = torch.randn(8, WIDTH), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", po.engine.PredictionWarning)
        for sign in signs:
            pipe.step(x, target=torch.full((8, 1), float(sign)))
            errors = [e.relative_error for e in pipe.prediction_error(0) if e.relative_error is not None]
            found.append((pipe.prediction_scales(0)[0], errors[0] if errors else 0.0))
    return found


def test_what_repeats_is_trusted_and_what_does_not_is_not():
    assert follow([1] * 30)[-1][0] == pytest.approx(1, abs=1e-2)
    noise = torch.randn(200, generator=torch.Generator().manual_seed(0)).tolist()
    scales, errors = zip(*follow(noise)[60:], strict=True)
    assert sum(scales) / len(scales) < 0.35
    none = [error for _, error in follow(noise, 1.0)[60:]]
    assert statistics.median(errors) < 1.05 < 1.2 < statistics.median(none), "as good as no prediction, which has 1"


def test_a_prediction_that_was_always_wrong_is_believed_again_when_it_is_right():
    """Gradients that alternate: the last one is the wrong sign each time."""
    scales = [scale for scale, _ in follow([1, -1] * 30 + [1] * 160)]
    assert scales[59] == LEAST and scales[-1] > 0.95 and max(scales) <= LARGEST


@pytest.mark.parametrize(("kind", "m"), [("refined", 1), ("displacement", 1), ("in_progress", 4)])
def test_a_resumed_run_equals_the_one_that_went_on(kind, m):
    def pipeline():
        return po.Emulator(
            layers(torch.float32), two_groups, loss_fn, "pipeoptim_stash", m, prediction=kind, scale="auto", clip=1.0
        )

    def train(pipe, batches):
        for x, y in batches:
            pipe.step(x, target=y)
        pipe.drain()

    def all_of(pipe):
        tensors = [t.clone() for k in range(DEPTH) for t in pipe.stage_module(k).state_dict().values()]
        return tensors, [pipe.prediction_scales(k) for k in range(DEPTH)]

    batches, pipe, resumed = data(36, torch.float32), pipeline(), pipeline()  # of float32, which kernels step and predict
    begun = copy.deepcopy([pipe.stage_state_dict(k) for k in range(DEPTH)])
    train(pipe, batches[:18])
    states = copy.deepcopy([pipe.stage_state_dict(k) for k in range(DEPTH)])
    train(pipe, batches[18:])
    tensors, scales = all_of(pipe)
    for one, at in (
        (resumed, 18),
        (pipe, 18),
        (pipe, 0),
    ):  # another run; the same one back at its checkpoint, and at its beginning
        for k, state in enumerate(copy.deepcopy(states if at else begun)):
            one.load_stage_state_dict(k, state)
        assert (one.prediction_scales(0) == [1.0, 1.0]) == (at == 0)
        if at == 0:
            train(one, batches[:18])
        train(one, batches[18:])
        again, their_scales = all_of(one)
        assert their_scales == scales and all(map(torch.equal, again, tensors))


def test_a_number_multiplies_every_predicted_displacement():
    stages, expected = layers(), []
    optimizers = [two_groups(stage.parameters()) for stage in stages]

    def updated(k, version):
        if (k, version) == (0, 5):
            pairs = zip(stages[0].parameters(), po.predict_weights(optimizers[0], DEPTH - 1), strict=True)
            expected.extend(p.detach() + 0.5 * (w_hat - p.detach()) for p, w_hat in pairs)

    pipe = po.Emulator(stages, optimizers, loss_fn, scale=0.5, on_update=updated)
    used = {}

    def forward(module, args):
        used[pipe.version(0)] = [p.detach().clone() for p in module.parameters()]

    stages[0].register_forward_pre_hook(forward)
    for x, y in data(10):
        pipe.step(x, target=y)
    assert pipe.prediction_scales(0) == [0.5] * 2 and "scale" not in (pipe.drain() or pipe.stage_state_dict(0))
    for found, wanted in zip(used[5], expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [0, -1.0, 2.5, True, None, "much", float("nan"), 10**400])
def test_bad_values_are_refused(scale):
    with pytest.raises(po.ConfigError, match="scale is .*above 0, at most 2, or 'auto'"):
        po.Emulator(layers(), two_groups, loss_fn, scale=scale)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"method": "1f1b"}, "predicts no forward by the rule"),
        ({"method": "spectrain"}, "predicts no forward by the rule"),
        ({"method": "pipemare"}, "predicts no forward by the rule"),
        ({"prediction": "none"}, "nothing to scale"),
    ],
)
def test_what_could_not_take_effect_is_refused(options, told):
    with pytest.raises(po.ConfigError, match=told):
        po.Emulator(layers(), two_groups, loss_fn, scale="auto", **options)
    po.Emulator(layers(), two_groups, loss_fn, scale=1.0, **options)


def test_a_run_shows_how_it_adapts(tmp_path, capsys):
    made = config(
        scale="auto",
        monitor_every=0,
        tensorboard=False,
        autocast="",
        microbatches=2,
        batch_size=8,
        steps=40,
        eval_every=0,
        checkpoint_every=0,
    )
    found = run(made, tmp_path / "run", progress=False)
    assert [row["step"] for row in rows(found, "prediction")] == [20, 40]
    scales = [entry["scale"] for row in rows(found, "prediction") for entry in row["prediction"] if entry["stage"] == 0]
    assert scales[-1] not in (0.0, 1.0) and found.stages[0].prediction_scale is not None
    assert f"{scales[-1]:.2f}</td>" in write_run_report(found.run_dir).read_text()
    print_summary(found, 40, "as it is")
    assert "scale" in capsys.readouterr().out
    plan = plan_comparison(
        ComparisonSettings(replace(made, scale="0.5"), methods=("1f1b", "pipeoptim", "spectrain"), seeds=(0,))
    )
    assert [one.config.scale for one in plan.runs] == ["1", "0.5", "1"] and not plan.left_out


def test_advice_is_given_where_figures_support_it():
    assert "overshoot, 0.40 times" in advice(0, 1.2, 1.0, 0.4)
    assert "fall short" in advice(1, 0.6, 1.0, 1.8)
    assert "next to nothing" in advice(2, 0.98, 0.2, 0.2)
    assert "larger beta1" in advice(2, 0.98, 0.2, 0.2)
    for error, scale, best in ((0.4, 1.0, 0.9), (0.8, 0.5, 0.5), (None, 1.0, None), (1.2, 0.2, 0.9)):
        assert advice(0, error, scale, best) is None
