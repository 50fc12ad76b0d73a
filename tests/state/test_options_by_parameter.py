"""Sharded checkpoints: every parameter keeps the options, the schedule and the memory that it was trained with, wherever it goes.

The oracle knows nothing of pipelines: the whole model with one optimizer that has a param group for each parameter. A flush method
with one micro-batch per mini-batch computes exactly that.
"""

from __future__ import annotations

import tempfile
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import pipeoptim as po

LAYERS, BEFORE, AFTER = 5, 3, 3
OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1),
}
OPTIONS = {
    "adamw": st.fixed_dictionaries(
        {
            "lr": st.sampled_from([1e-3, 1e-2]),
            "weight_decay": st.sampled_from([0.0, 0.1]),
            "betas": st.sampled_from([(0.9, 0.999), (0.8, 0.9)]),
        }
    ),
    "sgd": st.fixed_dictionaries(
        {
            "lr": st.sampled_from([0.01, 0.05]),
            "momentum": st.sampled_from([0.0, 0.9]),
            "weight_decay": st.sampled_from([0.0, 0.1]),
        }
    ),
}
SCHEDULERS = {
    "none": None,
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 9),
    "multistep": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 4], 0.3),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: 1 / (1 + n)),
    "onecycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, [g["lr"] for g in o.param_groups], 20, cycle_momentum=False),
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.LinearLR(o, 0.1, 1, 2), torch.optim.lr_scheduler.ExponentialLR(o, 0.7)], [2]
    ),
}


def build():
    torch.manual_seed(1)
    return nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(LAYERS)))


def batches(first, count):
    for n in range(first, first + count):
        g = torch.Generator().manual_seed(n)
        yield torch.randn(6, 4, generator=g), torch.randn(6, 4, generator=g)


def groups_of(stage, options, order, named):
    """One group for each set of options that the stage's trainable parameters have, in an order of their own."""
    found = {}
    for name, p in stage.named_parameters():
        if p.requires_grad:
            found.setdefault(tuple(sorted(options[name].items())), []).append((name, p) if named else p)
    made = [{"params": params, **dict(key)} for key, params in found.items()]
    return made[::-1] if order else made


def pipeline(cuts, case, order, options=None):
    model = build()
    for name, p in model.named_parameters():
        p.requires_grad_(name not in case["frozen"])
    stages = [model[a:b] for a, b in pairwise([0, *sorted(cuts), LAYERS])]
    options = options or case["options"]
    optimizers = []
    for stage in stages:
        groups = groups_of(stage, options, order, case["named"])
        optimizers.append(OPTIMIZERS[case["optimizer"]](groups) if groups else None)
    make = SCHEDULERS[case["scheduler"]]
    schedulers = [make(o) if make and o else None for o in optimizers]
    if make is None or None in optimizers:
        schedulers = schedulers if make else None
    pipe = po.Emulator(stages, optimizers, nn.functional.mse_loss, "1f1b", schedulers=schedulers)
    return pipe, model, optimizers


def oracle(case, steps):
    model = build()
    for name, p in model.named_parameters():
        p.requires_grad_(name not in case["frozen"])
    groups = [{"params": [p], **case["options"][name]} for name, p in model.named_parameters() if p.requires_grad]
    optimizer = OPTIMIZERS[case["optimizer"]](groups)
    make = SCHEDULERS[case["scheduler"]]
    scheduler = make(optimizer) if make else None
    for x, y in batches(0, steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        if scheduler:
            scheduler.step()
    return model, {id(g["params"][0]): g["lr"] for g in optimizer.param_groups}


def train(pipe, first, count):
    for x, y in batches(first, count):
        pipe.step(x, target=y)
    pipe.drain()


NAMES = [name for name, _ in build().named_parameters()]


@st.composite
def cases(draw):
    optimizer = draw(st.sampled_from(sorted(OPTIMIZERS)))
    by_layer = draw(st.booleans())  # layer-wise rates, or options of every parameter's own
    drawn = [draw(OPTIONS[optimizer]) for _ in range(LAYERS if by_layer else len(NAMES))]
    options = {name: drawn[int(name.split(".")[0]) if by_layer else n] for n, name in enumerate(NAMES)}
    frozen = draw(st.sets(st.sampled_from(NAMES[:-2]), max_size=3))
    return {
        "optimizer": optimizer,
        "options": options,
        "frozen": frozen,
        "named": draw(st.booleans()),
        "scheduler": draw(st.sampled_from(sorted(SCHEDULERS))),
    }


CUTS = st.sets(st.integers(1, LAYERS - 1))


@given(cases(), CUTS, CUTS, st.booleans())
def test_a_run_cut_anew_trains_every_parameter_as_before(case, before, after, order):
    pipe, _, _ = pipeline(before, case, False)
    train(pipe, 0, BEFORE)
    with tempfile.TemporaryDirectory() as folder:
        po.save_sharded(pipe, f"{folder}/c")
        resumed, model, optimizers = pipeline(after, case, order)
        assert po.load_sharded(resumed, f"{folder}/c") == (before == after)
    train(resumed, BEFORE, AFTER)
    expected, rates = oracle(case, BEFORE + AFTER)
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q), name
        if p.requires_grad:
            (group,) = [g for o in optimizers if o for g in o.param_groups if any(w is p for w in g["params"])]
            assert group["lr"] == rates[id(q)], name
            assert {key: group[key] for key in case["options"][name] if key != "lr"} == {
                key: value for key, value in case["options"][name].items() if key != "lr"
            }
            if case["named"]:
                assert len(group["param_names"]) == len(group["params"])


@given(cases(), CUTS, CUTS)
def test_groups_that_cannot_hold_the_options_of_their_parameters_are_refused_before_anything_is_loaded(case, before, after):
    """The new stages have one group each, so those whose parameters had several kinds of options cannot be loaded."""
    pipe, _, _ = pipeline(before, case, False)
    train(pipe, 0, BEFORE)
    one = {name: {"lr": 0.5} for name in NAMES}
    resumed, model, _ = pipeline(after, case, False, one)
    untouched = [p.detach().clone() for p in model.parameters()]
    trainable = [name for name in NAMES if name not in case["frozen"]]
    mixed = False
    for a, b in pairwise([0, *sorted(after), LAYERS]):
        inside = [name for name in trainable if a <= int(name.split(".")[0]) < b]
        mixed |= len({tuple(sorted(case["options"][name].items())) for name in inside}) > 1
    with tempfile.TemporaryDirectory() as folder:
        po.save_sharded(pipe, f"{folder}/c")
        if mixed:
            with pytest.raises(po.ConfigError, match=r"param group 0 of stage \d has .* which were trained with"):
                po.load_sharded(resumed, f"{folder}/c")
            assert all(torch.equal(p, q) for p, q in zip(model.parameters(), untouched, strict=True))
        else:
            po.load_sharded(resumed, f"{folder}/c")


def stage_run(ends, schedulers=None, optimizers=None, scaler=None, method="1f1b", **options):
    model = build()
    stages = [model[a:b] for a, b in pairwise([0, *ends, LAYERS])]
    made = optimizers or (lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9))
    pipe = po.Emulator(stages, made, nn.functional.mse_loss, method, schedulers=schedulers, scaler=scaler, **options)
    return pipe, model


def moved(source, target, tmp_path):
    po.save_sharded(source, tmp_path / "c")
    return po.load_sharded(target, tmp_path / "c")


def test_schedulers_in_different_states_stay_with_their_stages_and_do_not_merge(tmp_path):
    rates = iter([2, 5])
    pipe, _ = stage_run([3], schedulers=lambda o: torch.optim.lr_scheduler.StepLR(o, next(rates), 0.1))
    train(pipe, 0, 4)
    finer, _ = stage_run([1, 3], schedulers=lambda o: torch.optim.lr_scheduler.StepLR(o, 100, 0.1))
    moved(pipe, finer, tmp_path)
    found = [finer.stage_worker(k).scheduler for k in range(3)]
    assert [s.step_size for s in found] == [2, 2, 5]
    assert [s.get_last_lr() for s in found] == [pytest.approx([1e-4]), pytest.approx([1e-4]), [0.01]]
    other, _ = stage_run([2], schedulers=lambda o: torch.optim.lr_scheduler.StepLR(o, 100, 0.1))
    with pytest.raises(po.ConfigError, match=r"param group 0 of stage 1 has .*lr="):
        po.load_sharded(other, tmp_path / "c")


def test_schedulers_that_disagree_are_refused(tmp_path):
    lengths = iter([50, 60])
    pipe, _ = stage_run([3], schedulers=lambda o: torch.optim.lr_scheduler.StepLR(o, next(lengths), 0.1))
    train(pipe, 0, 2)
    merged, _ = stage_run([2], schedulers=lambda o: torch.optim.lr_scheduler.StepLR(o, 100, 0.1))
    with pytest.raises(po.ConfigError, match=r"'step_size' of the StepLR of stage 1 was 50 on stage 0, 60 on stage 1"):
        moved(pipe, merged, tmp_path)
    kind, _ = stage_run([3], schedulers=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.1))
    with pytest.raises(po.ConfigError, match=r"stage 0 has ExponentialLR, but its weights were trained with StepLR"):
        po.load_sharded(kind, tmp_path / "c")
    without, _ = stage_run([3])
    with pytest.raises(po.ConfigError, match=r"stage 0 has no scheduler, but its weights were trained with StepLR"):
        po.load_sharded(without, tmp_path / "c")


def test_a_scheduler_with_lists_that_only_look_like_its_groups_is_refused(tmp_path):
    class Pairs(torch.optim.lr_scheduler.LambdaLR):
        def __init__(self, optimizer):
            super().__init__(optimizer, lambda n: 1.0)
            self.pair = [1, 2]

    def two_groups(stages_order):
        def make(p):
            p = list(p)
            groups = [{"params": p[::2]}, {"params": p[1::2]}]
            return torch.optim.SGD(groups[::-1] if stages_order else groups, lr=0.01)

        return make

    pipe, _ = stage_run([3], schedulers=Pairs, optimizers=two_groups(False))
    train(pipe, 0, 1)
    same, _ = stage_run([2], schedulers=Pairs, optimizers=two_groups(False))
    moved(pipe, same, tmp_path)
    assert [same.stage_worker(k).scheduler.pair for k in range(2)] == [[1, 2], [1, 2]]
    turned, _ = stage_run([2], schedulers=Pairs, optimizers=two_groups(True))
    turned.stage_worker(0).scheduler.pair = [3, 4]
    with pytest.raises(po.ConfigError, match=r"'pair' of the Pairs of stage 0 may or may not belong"):
        po.load_sharded(turned, tmp_path / "c")


def test_a_weight_that_was_trained_is_not_frozen_in_silence(tmp_path):
    pipe, _ = stage_run([2])
    train(pipe, 0, 2)
    model = build()
    model[0][0].weight.requires_grad_(False)
    stages = [model[:2], model[2:]]
    made = [torch.optim.SGD([p for p in s.parameters() if p.requires_grad], lr=0.01, momentum=0.9) for s in stages]
    frozen = po.Emulator(stages, made, nn.functional.mse_loss, "1f1b")
    with pytest.raises(po.ConfigError, match=r"none of the param groups of stage 0 has '0\.0\.weight', which SGD moved"):
        moved(pipe, frozen, tmp_path)


@pytest.mark.parametrize("ends", [[2], [1, 2, 4], []])
def test_the_loss_scale_stays_in_force(tmp_path, ends):
    def scaler():
        return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)

    pipe, _ = stage_run([1, 3], scaler=scaler)
    train(pipe, 0, 4)
    last = pipe.stage_worker(2).scaling
    assert last.scaler.get_scale() == 2.0**11
    pipe.stage_worker(0).scaling.note_overflow(2.0**11)  # an overflow that the last stage has not heard of yet
    other, _ = stage_run(ends, scaler=lambda: torch.amp.GradScaler("cpu", init_scale=2.0))
    moved(pipe, other, tmp_path)
    depth = len(ends) + 1
    assert other.stage_worker(depth - 1).scaling.scaler.state_dict() == last.scaler.state_dict()
    assert other.stage_worker(0).scaling.overflowed == 2.0**11
    train(other, 4, 1)
    assert other.stage_worker(depth - 1).scaling.scaler.get_scale() == 2.0**10


@pytest.mark.parametrize("after", [[1, 2, 3, 4], [2], [1, 4]])
@pytest.mark.parametrize(
    ("method", "kind"), [("pipeoptim", "refined"), ("pipeoptim", "displacement"), ("spectrain", "refined")]
)
def test_what_a_predictor_remembers_follows_its_parameters(tmp_path, method, kind, after):
    def made(p):
        return torch.optim.SGD(p, lr=0.05)  # its rule reads the last gradient, which is part of what is remembered

    before = [1, 3, 4]
    pipe, model = stage_run(before, method=method, prediction=kind, optimizers=made)
    train(pipe, 0, 4)
    other, twin = stage_run(after, method=method, prediction=kind, optimizers=made)
    moved(pipe, other, tmp_path)
    ahead, known = predictions(pipe, model), predictions(other, twin)
    both = ahead.keys() & known.keys()
    weights = dict(model.named_parameters())
    told = 0
    for name in both:
        if torch.equal(known[name], weights[name]):  # on a stage with parameters of one that remembered nothing
            continue
        told += 1
        torch.testing.assert_close(known[name], ahead[name], rtol=0, atol=1e-6)
        assert not torch.equal(ahead[name], weights[name])
    assert told, "something was remembered"


def predictions(pipe, model):
    """Two updates ahead, of every parameter of a stage with a predictor."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for k in pipe.local_stages:
        worker = pipe.stage_worker(k)
        if worker.predictor is not None:
            out = [torch.empty_like(p) for p in worker.weights.params]
            worker.predictor.predict_into(out, 2)
            found |= {names[id(p)]: t for p, t in zip(worker.weights.params, out, strict=True)}
    return found
