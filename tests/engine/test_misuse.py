"""Mistakes that users make in a script: one sentence that says what was given and what to give instead."""

import copy
import pickle
import re
import warnings

import pytest
import torch
from torch import nn

import pipeoptim as po

x = torch.ones(4, 4)


def emulator(loss_fn=nn.functional.mse_loss, **options):
    stages = [nn.Linear(4, 4) for _ in range(2)]
    return po.Emulator(stages, lambda p: torch.optim.SGD(p, lr=0.1), loss_fn, **options)


def model():
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def scheduled(make, optimizers=lambda p: torch.optim.SGD(p, lr=0.1)):
    return po.Emulator([nn.Linear(4, 4), nn.Linear(4, 4)], optimizers, nn.functional.mse_loss, schedulers=make)


def useless_scheduler():
    first = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(first.parameters(), lr=0.1)
    rates = [None, torch.optim.lr_scheduler.ConstantLR(optimizer)]
    return po.Emulator([first, nn.Identity()], [optimizer, None], nn.functional.mse_loss, schedulers=rates)


def plateau(optimizer):
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)


def unstepped(optimizer):
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    scheduler.__class__ = Chosen
    return scheduler


class Chosen(torch.optim.lr_scheduler.ConstantLR):
    def step(self, epoch, best):
        super().step()


def chained(optimizer):
    chain = torch.optim.lr_scheduler.ChainedScheduler([torch.optim.lr_scheduler.ConstantLR(optimizer)])
    chain._schedulers.append(plateau(optimizer))
    return chain


weighed = {"loss_weight": lambda target: (target > 0).sum()}
CASES = {
    "scheduler that wants a metric": (
        lambda _: scheduled(plateau),
        r"stage 0 is a ReduceLROnPlateau, whose step needs a metric .*pipe.evaluate\(batches\).loss",
    ),
    "metric inside a chain": (lambda _: scheduled(chained), "stage 0 is a ReduceLROnPlateau, whose step needs a metric"),
    "scheduler of one's own that wants arguments": (lambda _: scheduled(unstepped), "is a Chosen"),
    "scheduler that is none": (lambda _: scheduled([0.1, 0.1]), r"of stage 0 is a float, must have a step\(\)"),
    "scheduler without optimizer": (lambda _: useless_scheduler(), "stage 1 has a scheduler but no optimizer"),
    "prediction that none makes": (
        lambda _: emulator(method="1f1b", prediction="paper"),
        "prediction is 'paper', but method '1f1b' predicts no weights; leave it out",
    ),
    "monitor of no prediction": (
        lambda _: emulator(method="pipedream", monitor=2),
        "monitor is 2, but method 'pipedream' predicts",
    ),
    "monitor of corrected backwards": (lambda _: emulator(method="pipemare", monitor=True), "no weights of a forward"),
    "weighing without target": (
        lambda _: emulator(lambda out, _: out.sum(), method="1f1b", microbatches=2, **weighed).step(x),
        "loss_weight was given, but no target .* give the labels as target=",
    ),
    "weighing an evaluation without target": (
        lambda _: emulator(lambda out, _: out.sum(), **weighed).evaluate([(x, None)]),
        "loss_weight was given, but no target",
    ),
    "step without target": (lambda _: emulator().step(x), r"loss_fn failed without a target \(.*step\(\.\.\., target=y\)"),
    "eval_step without target": (lambda _: emulator().eval_step(x), "loss_fn failed without a target"),
    "no loss function": (lambda _: emulator(None), "loss_fn is None, must be a function of output and target"),
    "loss function of one argument": (
        lambda _: emulator(lambda out: out.sum()),
        "loss_fn is <function .* of output and target",
    ),
    "class of a loss": (lambda _: emulator(nn.MSELoss), r"loss_fn is the class MSELoss, must be an object of it: MSELoss\(\)"),
    "complex loss": (
        lambda _: emulator(lambda out, y: out.sum() * 1j).step(x, target=x),
        "loss_fn returned a complex number, which cannot be minimised",
    ),
    "on_update of one argument": (
        lambda _: emulator(on_update=lambda k: None),
        "on_update is <.* which does not take 2 arguments",
    ),
    "loss_weight of two": (
        lambda _: emulator(loss_weight=lambda a, b: 1),
        "loss_weight is <.* which does not take 1 arguments",
    ),
    "training without gradients": (
        lambda _: torch.inference_mode()(lambda: emulator().step(x, target=x))(),
        r"step\(\) was called without gradients \(inside no_grad or inference_mode\)",
    ),
    "lazy stage": (
        lambda _: po.Emulator(
            [nn.Linear(4, 4), nn.LazyLinear(4)], lambda p: torch.optim.SGD(p, lr=0.1), nn.functional.mse_loss
        ),
        "'weight' of stage 1 has no shape yet .* run the model once",
    ),
    "lazy model": (
        lambda _: po.partition(nn.ModuleDict({"a": nn.LazyLinear(4)}), 1, (x,)),
        "'a.weight' of the ModuleDict has no shape yet .* run the model once",
    ),
    "seed that is text": (lambda _: emulator(seed="a"), "seed is 'a', must be an integer, or None"),
    "seed that is a float": (lambda _: emulator(seed=1.5), "seed is 1.5, must be an integer"),
    "no list of pins": (lambda _: po.partition(model(), 2, (x,), pins=None), "pins is None, must be a list .* leave it out"),
    "pins that are one name": (lambda _: po.partition(model(), 2, (x,), pins="1"), "pins is '1', must be a list"),
    "weights of a module": (
        lambda f: po.save_weights(model(), f / "w"),
        r"save_weights\(\) was given a Sequential, must .* pipeline",
    ),
    "state of a module": (
        lambda _: po.full_state_dict(model()),
        r"full_state_dict\(\) was given a Sequential, must .* pipeline",
    ),
    "checkpoint of a module": (lambda f: po.save_sharded(model(), f / "s"), r"save_sharded\(\) was given a Sequential"),
    "checkpoint into a module": (lambda f: po.load_sharded(model(), f / "s"), r"load_sharded\(\) was given a Sequential"),
    "weights into a pipeline": (
        lambda f: po.load_weights(emulator(), f),
        r"load_weights\(\) was given an object of type Emulator, .* pipe.stage_module",
    ),
    "ties of a number": (lambda _: po.untie(3), r"untie\(\) was given 3, must be given the list"),
    "ties of numbers": (lambda _: po.untie([3]), r"untie\(\) was given \[3\], must be given the list"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_told_in_a_sentence(case, tmp_path):
    work, words = CASES[case]
    with pytest.raises(po.ConfigError, match=words) as told:
        work(tmp_path)
    assert len(str(told.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_needs_no_target_gets_none_and_its_own_errors_stay_its_own():
    assert emulator(lambda out, target: out.square().mean()).step(x) > 0
    with pytest.raises(TypeError, match="unsupported operand"):
        emulator(lambda out, target: out + {}).step(x, target=x)


class Cut(nn.Linear):
    """Linear, with something done to what comes in and what goes out."""

    def __init__(self, before=lambda x: x, after=lambda y: y):
        super().__init__(4, 4)
        self.before, self.after = before, after

    def forward(self, x):
        return self.after(super().forward(self.before(x)))


def regularized(y):
    po.add_loss("small", y.square().mean())
    return y.detach()


@pytest.mark.parametrize(
    ("middle", "frozen", "told"),
    [
        (Cut(), (), []),
        (Cut(before=torch.detach), (), [r"stage 0 learns nothing.* stage 1 sends none back; leave out detach\(\)"]),
        (
            Cut(after=torch.detach),
            (),
            ["stage 0 learns nothing.* stage 1 sends none back", "stage 1 learns nothing.* its output has"],
        ),
        (Cut(after=lambda y: y.argmax(1)), (), ["stage 0 learns", "stage 1 learns nothing.* its output has no graph"]),
        (Cut(before=torch.detach), (0,), []),  # nothing would be learnt before it
        (Cut(after=torch.detach), (1,), ["stage 0 learns nothing"]),
        (Cut(after=regularized), (), []),
    ],
)
@pytest.mark.parametrize("method", ["pipeoptim", "gpipe"])
def test_stages_that_no_gradient_comes_to_are_named_once(middle, frozen, told, method):
    last = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4)) if middle(x).dim() == 1 else nn.Linear(4, 4)
    stages = [nn.Linear(4, 4), middle, last]
    for k, stage in enumerate(stages):
        stage.requires_grad_(k not in frozen)
    pipe = po.Emulator(stages, lambda p: torch.optim.SGD(p, lr=0.1), nn.functional.mse_loss, method, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(6):
            pipe.step(x, target=x)
    found = sorted(str(warning.message) for warning in caught)
    assert len(found) == len(told), found
    for message, words in zip(found, told, strict=True):
        assert re.search(words, message)


def test_a_micro_batch_that_counts_for_nothing_is_no_mistake():
    pipe = emulator(microbatches=2, loss_weight=lambda target: float(target.sum()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            pipe.step(x, target=torch.cat([torch.ones(2, 4), torch.zeros(2, 4)]))


@pytest.mark.parametrize("method", ["gpipe", "1f1b", "naive", "pipedream", "pipeoptim", "pipeoptim_stash"])
@pytest.mark.parametrize("drained", [True, False])
def test_parameters_given_to_the_optimizer_later_are_refused_before_anything_moves(method, drained):
    stages = [nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3)]
    late = list(stages[0][0].parameters())
    for p in late:
        p.requires_grad_(False)
    optimizers = [torch.optim.SGD([p for p in s.parameters() if p.requires_grad], lr=0.1) for s in stages]
    pipe = po.Emulator(stages, optimizers, nn.functional.mse_loss, method)
    for _ in range(4):
        pipe.step(x, target=x)
    if drained:
        pipe.drain()
    for p in late:
        p.requires_grad_(True)
    optimizers[0].add_param_group({"params": late})
    before = [p.clone() for p in stages[0].parameters()]
    with pytest.raises(
        po.ConfigError, match=r"stage 0 holds 4 parameters, but 2 when .*add_param_group.*requires_grad_\(True\)"
    ):
        pipe.step(x, target=x)
    assert all(torch.equal(p, q) for p, q in zip(stages[0].parameters(), before, strict=True))
    if drained:  # what the message says
        again = po.Emulator(stages, optimizers, nn.functional.mse_loss, method)
        for _ in range(4):
            again.step(x, target=x)
        assert not torch.equal(late[0], before[0])


@pytest.mark.parametrize("method", ["1f1b", "naive", "pipedream", "pipeoptim", "pipeoptim_stash"])
def test_unfreezing_what_the_optimizer_holds_trains_it(method):
    stages = [nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3)]
    late = list(stages[0][0].parameters())
    for p in late:
        p.requires_grad_(False)
    pipe = po.Emulator(stages, lambda p: torch.optim.SGD(p, lr=0.1), nn.functional.mse_loss, method)
    frozen = late[0].clone()
    for _ in range(4):
        pipe.step(x, target=x)
    assert torch.equal(late[0], frozen)
    pipe.drain()
    for p in late:
        p.requires_grad_(True)
    for _ in range(4):
        pipe.step(x, target=x)
    assert not torch.equal(late[0], frozen)


def test_a_scheduler_that_wants_a_metric_works_beside_the_pipeline():
    pipe = emulator()
    beside = [plateau(pipe.stage_worker(k).optimizer) for k in range(2)]
    for scheduler in beside:
        scheduler.patience = 0
    for _ in range(4):
        pipe.step(x, target=x)
        for scheduler in beside:
            scheduler.step(pipe.evaluate([(x, x + 1e6)]).loss * 0 + 1)
    assert [pipe.stage_worker(k).optimizer.param_groups[0]["lr"] for k in range(2)] == pytest.approx([1e-4, 1e-4])


@pytest.mark.parametrize("call", ["step", "drain", "eval_step", "evaluate"])
def test_what_would_tear_a_step_apart_is_refused_within_it(call):
    x = torch.randn(6, 3)
    arguments = {
        "step": ((x,), {"target": x}),
        "eval_step": ((x,), {"target": x, "drain": False}),
        "evaluate": (([(x, x)],), {}),
    }

    def hook(k, version):
        if (k, version) == (0, 3):
            args, kwargs = arguments.get(call, ((), {}))
            getattr(pipe, call)(*args, **kwargs)

    def train():
        for _ in range(8):
            pipe.step(x, target=x)

    stages = [nn.Linear(3, 3) for _ in range(3)]
    pipe = po.Emulator(stages, lambda p: torch.optim.SGD(p, lr=0.1), nn.functional.mse_loss, microbatches=3, on_update=hook)
    with pytest.raises(po.ConfigError, match=rf"{call}\(\) was called from within on_update, in the middle of a step"):
        train()


def test_options_that_are_trivially_satisfied_are_taken():
    pipe = emulator(uneven=True, recompute="forward", clip=po.Clip(1.0, "global"), **weighed)
    pipe.step(x, target=x)
    emulator(method="1f1b", prediction="none").step(x, target=x)


@pytest.mark.parametrize("given", [None, 3, "ab", range(10**12), iter([nn.Linear(2, 2), 5])])
def test_stages_that_are_no_modules_are_refused(given):
    with pytest.raises(po.ConfigError, match="must be a list of modules|must be a torch.nn.Module"):
        po.Emulator(given, lambda p: torch.optim.SGD(p, lr=0.1), nn.functional.mse_loss)


def test_a_target_that_is_given_by_position_is_told():
    pipe = po.Emulator([nn.Linear(2, 2)], lambda p: torch.optim.SGD(p, lr=0.1), nn.functional.mse_loss)
    with pytest.raises(
        po.ConfigError, match=r"the model failed with 2 inputs .*; if one of them is the target, give it by name"
    ):
        pipe.step(torch.ones(4, 2), torch.ones(4, 2))


def test_a_function_that_fails_is_named_and_its_error_is_the_cause():
    def fails(_):
        return 1 / 0

    with pytest.raises(po.ConfigError, match="failed for stage 0: ZeroDivisionError: .* with the list of the stage's") as told:
        po.Emulator([nn.Linear(2, 2)], fails, nn.functional.mse_loss)
    assert isinstance(told.value.__cause__, ZeroDivisionError)


def test_a_pipeline_is_neither_copied_nor_pickled():
    pipe = emulator()
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(po.ConfigError, match="stage_state_dict"):
            attempt(pipe)
