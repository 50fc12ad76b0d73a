"""Step and prediction in one pass: the step is torch's to float32 rounding, the prediction that of the plain path to the bit."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.optim import Optimizer

from pipeoptim.kernels import available, calls
from pipeoptim.rules import CombinedOptimizer, Predictor, Rule, predict_weights, register_rule
from pipeoptim.rules.registry import RULES

pytestmark = pytest.mark.skipif(not available(), reason="no C compiler")

OPTIONS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "adam": (torch.optim.Adam, {"lr": 0.01}),
    "adam_b1_0": (torch.optim.Adam, {"lr": 0.01, "betas": (0.0, 0.9)}),
    "adam_coupled": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1, "maximize": True}),
    "adam_decoupled": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    "adam_fused": (torch.optim.Adam, {"lr": 0.01, "fused": True}),
    "adam_foreach": (torch.optim.Adam, {"lr": 0.01, "foreach": True}),
    "adam_tensors": (torch.optim.Adam, {"lr": torch.tensor(0.01), "betas": (torch.tensor(0.8), torch.tensor(0.9))}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-3}),
    "adamw_maximize": (torch.optim.AdamW, {"lr": 0.01, "maximize": True}),
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "sgd_decay": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1, "maximize": True}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "momentum_all": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1, "maximize": True}),
    "nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1}),
    "momentum_fused": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "fused": True}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.2, "maximize": True}),
    "adagrad_fused": (torch.optim.Adagrad, {"lr": 0.1, "initial_accumulator_value": 0.3, "eps": 1e-3, "fused": True}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "eps": 1e-3}),
    "rmsprop_maximize": (torch.optim.RMSprop, {"lr": torch.tensor(0.01), "alpha": 0.8, "maximize": True}),
    "radam": (torch.optim.RAdam, {"lr": 0.01, "betas": (0.8, 0.99), "weight_decay": 0.1}),
    "radam_decoupled": (torch.optim.RAdam, {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True}),
}
BY_TORCH = {"sgd": 0, "sgd_decay": 0, "adagrad": 0, "adagrad_fused": 0, "radam": 5, "radam_decoupled": 5}
"""First steps that torch has to take itself: 1, which makes the state, for most."""

KINDS = ("refined", "paper", "decayed", "displacement", "none")
FORMS = ("plain", "unaligned", "channels_last", "transposed", "scalar", "empty", "large")


def tensor(form: str, seed: int) -> Tensor:
    torch.manual_seed(seed)
    if form == "plain":
        return torch.randn(7, 13)
    if form == "unaligned":
        return torch.randn(200)[3:100]
    if form == "channels_last":
        return torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    if form == "transposed":
        return torch.randn(9, 5).t()
    return {"scalar": torch.randn(()), "empty": torch.randn(0, 3), "large": torch.randn(70_001)}[form]


def copy_of(value: Tensor) -> Tensor:
    """The same values in the same layout; an odd address stays odd."""
    base = torch.empty(value.numel() + 3)[3:] if value.storage_offset() else torch.empty(value.numel())
    return base.as_strided(value.size(), value.stride(), base.storage_offset()).copy_(value)


def make(name: str, forms: tuple[str, ...]) -> Optimizer:
    cls, options = OPTIONS[name]
    weights = [torch.nn.Parameter(tensor(form, seed)) for seed, form in enumerate(forms)]
    groups = [{"params": weights[::2]}, {"params": weights[1::2], "lr": 0.5 * options["lr"]}]
    if not weights[1::2]:
        groups.pop()
    return cls(groups, **copy.deepcopy(options))  # type: ignore[call-arg]


def weights_of(optimizer: Optimizer) -> list[Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def give_gradients(optimizer: Optimizer, seed: int, without: int | None = None) -> None:
    for n, weight in enumerate(weights_of(optimizer)):
        torch.manual_seed(1000 * seed + n)
        values = torch.randn(weight.numel())
        grad = copy_of(weight.detach())
        weight.grad = None if n == without else grad.copy_(values.reshape(weight.shape))


def close(first: list[Tensor], second: list[Tensor], units: float = 8.0) -> None:
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=units * 2**-23, atol=units * 2**-24)


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_a_step_without_prediction_is_torchs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = make(name, FORMS), make(name, FORMS)
    predictor = Predictor(ours, kind="none")
    used = []
    original = calls.MultiTensorStep.run
    monkeypatch.setattr(calls.MultiTensorStep, "run", lambda self, *how: (used.append(len(how[1])), original(self, *how)))
    last = BY_TORCH.get(name, 1) + 2
    for update in range(last + 1):
        for optimizer in (ours, theirs):
            give_gradients(optimizer, update, without=1 if update == last else None)
        predictor.step()
        theirs.step()
        close(weights_of(ours), weights_of(theirs))
    assert used == [len(FORMS), len(FORMS), len(FORMS) - 1]
    assert ours.state_dict()["state"].keys() == theirs.state_dict()["state"].keys()
    for mine, other in zip(ours.state.values(), theirs.state.values(), strict=True):
        close([v for v in mine.values() if isinstance(v, Tensor)], [v for v in other.values() if isinstance(v, Tensor)])


def test_tensors_that_were_fit_are_looked_at_again_when_they_change() -> None:
    optimizer, predictor, out = stepped()
    assert predictor.fused_step(out, 1)
    weight = weights_of(optimizer)[0]
    rows, columns = weight.shape
    state = optimizer.state[weight]
    kept, state["exp_avg"] = state["exp_avg"], torch.zeros(rows, 2 * columns)[:, ::2]
    assert not predictor.fused_step(out, 1)  # a state with gaps
    state["exp_avg"] = kept
    assert predictor.fused_step(out, 1)
    whole = weight.data
    weight.data = torch.zeros(rows, 2 * columns)[:, ::2]
    assert not predictor.fused_step(out, 1)  # a weight with gaps
    weight.data = whole
    weight.grad = torch.zeros(rows, 2 * columns)[:, ::2]
    assert not predictor.fused_step(out, 1)  # a gradient with gaps
    weight.grad = torch.zeros_like(whole)
    assert predictor.fused_step(out, 1)


def moved_elsewhere(optimizer: Optimizer) -> None:
    for weight, state in optimizer.state.items():
        for tensor in (weight, *(value for value in state.values() if isinstance(value, Tensor))):
            tensor.data = copy_of(tensor.detach())


CHANGES: dict[str, Any] = {
    "none": lambda optimizer: None,
    "all tensors lie elsewhere": moved_elsewhere,
    "a state's tensor is another": lambda o: o.state[weights_of(o)[0]].update(
        {k: v.clone() if isinstance(v, Tensor) else v for k, v in o.state[weights_of(o)[0]].items()}
    ),
    "a state is another": lambda o: o.state.__setitem__(weights_of(o)[1], copy.deepcopy(o.state[weights_of(o)[1]])),
    "all state is another": lambda o: o.load_state_dict(copy.deepcopy(o.state_dict())),
    "counts differ": lambda o: o.state[weights_of(o)[0]]["step"].add_(3.0) if "step" in o.state[weights_of(o)[0]] else None,
    "a gradient is missing": lambda o: setattr(weights_of(o)[0], "grad", None),
    "another rate": lambda o: o.param_groups[0].update(lr=0.3),
    "no momentum": lambda o: o.param_groups[0].update(momentum=0) if "nesterov" in o.param_groups[0] else None,
    "another order": lambda o: o.param_groups.reverse(),
    "a weight more": lambda o: o.param_groups[0]["params"].append(torch.nn.Parameter(torch.ones(3))),
}


@pytest.mark.parametrize("name", ["adamw", "momentum", "sgd", "rmsprop", "radam"])
def test_what_was_found_out_is_forgotten_when_anything_changes(name: str) -> None:
    for what, change in CHANGES.items():
        ours, theirs = make(name, ("plain", "unaligned", "transposed")), make(name, ("plain", "unaligned", "transposed"))
        predictor = Predictor(ours)
        fused = 0
        out: list[Tensor] = []
        for update in range(11):
            for optimizer in (ours, theirs):
                give_gradients(optimizer, update)
                if update == 8:
                    change(optimizer)
            theirs.step()
            out = [torch.empty_like(w.detach()) for w in weights_of(ours)] if update in (0, 8) else out
            if not predictor.fused_step(out, 2):
                ours.step()
            else:
                fused += 1
                assert all(map(torch.equal, out, predict_weights(ours, 2))), what
        close(weights_of(ours), weights_of(theirs), units=64.0)
        by_torch = BY_TORCH.get(name, 1)
        again = min(2, by_torch) if what == "a weight more" else 0  # the first steps of that one
        assert fused == 11 - by_torch - again, what


@settings(max_examples=150)
@given(st.data())
def test_step_is_torchs_and_prediction_is_that_of_the_plain_path(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(OPTIONS)), label="optimizer")
    forms = tuple(data.draw(st.lists(st.sampled_from(FORMS), min_size=1, max_size=4), label="forms"))
    kind = data.draw(st.sampled_from([k for k in KINDS if k != "decayed" or "adagrad" not in name]), label="kind")
    steps = data.draw(st.integers(1, 5), label="steps")
    without = data.draw(st.sampled_from([None, 0, 1]), label="without gradient")
    streamed = data.draw(st.booleans(), label="streamed")
    threads = data.draw(st.sampled_from([1, 2]), label="threads")
    ours, theirs = make(name, forms), make(name, forms)
    predictor = Predictor(ours, kind=kind)
    assert predictor.fuses
    out = [copy_of(w.detach()).fill_(float("nan")) for w in weights_of(ours)]
    last = BY_TORCH.get(name, 1) + 1
    limit = calls.STREAM_FROM
    calls.STREAM_FROM = 0 if streamed else limit
    torch.set_num_threads(threads)
    try:
        for update in range(last + 1):
            for optimizer in (ours, theirs):
                give_gradients(optimizer, update, without if update == last else None)
            before = [w.detach().clone() for w in weights_of(ours)]
            theirs.step()
            moving = any(w.grad is not None for w in weights_of(ours))
            made_by_torch = update < BY_TORCH.get(name, 1)
            if predictor.fused_step(out, steps):
                assert moving and not made_by_torch
            else:
                assert made_by_torch or not moving
                ours.step()
    finally:
        calls.STREAM_FROM = limit
        torch.set_num_threads(1)
    close(weights_of(ours), weights_of(theirs))
    for mine, other in zip(ours.state.values(), theirs.state.values(), strict=True):
        assert mine.keys() == other.keys()
        close([v for v in mine.values() if isinstance(v, Tensor)], [v for v in other.values() if isinstance(v, Tensor)])
    if not moving:
        return
    predictor.after_step()
    if kind == "displacement":
        now = [w.detach() for w in weights_of(ours)]
        close(out, [w + steps * (w - old) for w, old in zip(now, before, strict=True)], units=8 * (1 + steps))
    else:
        expected = predict_weights(ours, steps, kind=kind)
        assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
    assert predictor.still_holds(steps)
    again = [torch.empty_like(b) for b in out]
    predictor.predict_into(again, steps)  # what an engine would do had the step not been fused
    close(again, out, units=0.0 if kind != "displacement" else 8.0 * (1 + steps))
    predictor.predict_into(out, steps + 1)
    if kind == "displacement":
        close(out, [w + (steps + 1) * (w - old) for w, old in zip(now, before, strict=True)], units=16 * (2 + steps))
    else:
        assert all(torch.equal(a, b) for a, b in zip(out, predict_weights(ours, steps + 1, kind=kind), strict=True))


@pytest.mark.parametrize("name", ["adamw", "nesterov", "rmsprop"])
def test_numbers_do_not_depend_on_threads_chunks_alignment_or_streaming(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    values = [torch.randn(200_003) for _ in range(3)]
    found = []
    for threads, offset, streamed in ((1, 0, False), (2, 1, False), (1, 5, True), (2, 0, True)):
        monkeypatch.setattr(calls, "STREAM_FROM", 0 if streamed else 1 << 60)
        place = [torch.empty(200_010)[offset : offset + 200_003].copy_(v) for v in values]
        weight = torch.nn.Parameter(place[0])
        weight.grad = place[1]
        cls, options = OPTIONS[name]
        optimizer = cls([weight], **options)  # type: ignore[call-arg]
        optimizer.step()
        weight.grad = place[2]
        out = [torch.empty(200_010)[offset : offset + 200_003]]
        torch.set_num_threads(threads)
        try:
            assert Predictor(optimizer).fused_step(out, 3)
        finally:
            torch.set_num_threads(1)
        found.append((weight.detach().clone(), out[0].clone()))
    assert all(torch.equal(a, b) for each in found[1:] for a, b in zip(each, found[0], strict=True))


def stepped(name: str = "adamw") -> tuple[Optimizer, Predictor, list[Tensor]]:
    optimizer = make(name, ("plain", "unaligned"))
    give_gradients(optimizer, 0)
    optimizer.step()
    give_gradients(optimizer, 1)
    return optimizer, Predictor(optimizer), [torch.empty_like(w.detach()) for w in weights_of(optimizer)]


def refused(optimizer: Optimizer, predictor: Predictor, out: list[Tensor]) -> bool:
    """Whether fused_step returns False, and has done nothing then."""
    before = copy.deepcopy(optimizer.state_dict()), [w.detach().clone() for w in weights_of(optimizer)]
    if predictor.fused_step(out, 2):
        return False
    after = optimizer.state_dict()
    assert all(torch.equal(w, old) for w, old in zip(weights_of(optimizer), before[1], strict=True))
    for number, state in after["state"].items():
        assert all(torch.equal(state[k], before[0]["state"][number][k]) for k in state if isinstance(state[k], Tensor))
    return True


@pytest.mark.parametrize("name", ["adamw", "momentum", "sgd"])
def test_it_works_in_the_plain_case(name: str) -> None:
    assert not refused(*stepped(name))


def test_listeners_of_the_step_are_heard() -> None:
    for register in ("register_step_pre_hook", "register_step_post_hook"):
        optimizer, predictor, out = stepped()
        handle = getattr(optimizer, register)(lambda *args: None)
        assert refused(optimizer, predictor, out)
        handle.remove()
        assert not refused(optimizer, predictor, out)
    from torch.optim.optimizer import register_optimizer_step_post_hook

    optimizer, predictor, out = stepped()
    handle = register_optimizer_step_post_hook(lambda *args: None)
    assert refused(optimizer, predictor, out)
    handle.remove()


def test_patched_steps_loss_scaling_and_subclasses_run_as_they_are() -> None:
    optimizer, predictor, out = stepped()
    plain = optimizer.step
    optimizer.step = lambda: plain()  # type: ignore[method-assign]
    assert refused(optimizer, predictor, out)
    optimizer, predictor, out = stepped()
    optimizer.grad_scale = torch.tensor(2.0)  # type: ignore[attr-defined]
    assert refused(optimizer, predictor, out)

    class Different(torch.optim.AdamW):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            raise AssertionError

    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    assert not Predictor(Different([weight])).fuses
    assert refused(Different([weight]), Predictor(Different([weight])), [torch.ones(3)])


def test_a_rule_of_ones_own_for_adam_is_asked() -> None:
    real = RULES[torch.optim.Adam]

    class Mine(type(real)):  # type: ignore[misc]
        def move(self, *args: Any) -> Any:
            return None

    class Plain(Rule):
        exact, source = "never", "this test"

        def move(self, *args: Any) -> Any:
            return None

    try:
        for rule in (Mine, Plain):
            register_rule(torch.optim.Adam)(rule)
            optimizer, predictor, out = stepped("adam")
            assert not predictor.fuses
            assert refused(optimizer, predictor, out)
    finally:
        RULES[torch.optim.Adam] = real


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("adamw", "amsgrad", True),
        ("adamw", "capturable", True),
        ("rmsprop", "centered", True),
        ("rmsprop", "momentum", 0.9),
        ("rmsprop", "weight_decay", 0.1),
        ("adagrad", "weight_decay", 0.1),
    ],
)
def test_options_that_the_kernel_lacks(name: str, option: str, value: object) -> None:
    optimizer, predictor, out = stepped(name)
    assert not refused(optimizer, predictor, out)
    optimizer.param_groups[1][option] = value
    assert refused(optimizer, predictor, out)


def test_other_types_layouts_and_switches() -> None:
    weight = torch.nn.Parameter(torch.randn(4, dtype=torch.float64))
    assert not Predictor(torch.optim.SGD([weight], lr=0.1)).fuses
    gaps = torch.nn.Parameter(torch.randn(4, 6)[:, ::2])
    gaps.grad = torch.randn(4, 3)
    optimizer = torch.optim.SGD([gaps], lr=0.1)
    assert refused(optimizer, Predictor(optimizer), [torch.empty(4, 3)])
    optimizer, predictor, out = stepped()
    weights_of(optimizer)[0].grad = torch.randn(13, 7).t()  # another order in memory than the weight
    assert refused(optimizer, predictor, out)
    optimizer, predictor, out = stepped()
    off = Predictor(optimizer, fused=False)
    assert not off.fuses
    assert refused(optimizer, off, out)
    assert not predictor.fused_step(out, 0)


def test_schedulers_know_of_the_step_and_their_next_rates_are_used() -> None:
    ours, predictor, out = stepped()
    theirs = stepped()[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pair = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (ours, theirs)]
        predictor = Predictor(ours, scheduler=pair[0])
        assert predictor.fused_step(out, 3)
        pair[0].step()  # would warn if no step were noted
        theirs.step()
        pair[1].step()
    predictor.after_step()
    assert predictor.still_holds(3)
    expected = predict_weights(ours, 3, scheduler=pair[0])
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
    close(out, predict_weights(theirs, 3, scheduler=pair[1]))


def test_changes_by_hand_after_the_step_are_noticed() -> None:
    optimizer, predictor, out = stepped()
    assert predictor.fused_step(out, 2)
    assert predictor.still_holds(2)
    optimizer.param_groups[0]["lr"] *= 2
    assert not predictor.still_holds(2)
    optimizer.param_groups[0]["lr"] /= 2
    assert predictor.still_holds(2)
    assert not predictor.still_holds(3)
    with torch.no_grad():
        weights_of(optimizer)[0].clamp_(-0.1, 0.1)
    assert not predictor.still_holds(2)


def test_state_dict_is_torchs_and_torch_goes_on_from_it() -> None:
    ours, predictor, out = stepped()
    theirs = stepped()[0]
    assert predictor.fused_step(out, 2)
    theirs.step()
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    for number, state in other["state"].items():
        for key, value in state.items():
            found = mine["state"][number][key]
            assert (found.dtype, found.shape, found.device) == (value.dtype, value.shape, value.device)
            assert key != "step" or found == value == 2
    ours.load_state_dict(copy.deepcopy(other))
    give_gradients(ours, 2)
    assert predictor.fused_step(out, 2)


def test_combined_optimizers_are_fused_where_all_members_are() -> None:
    def both() -> CombinedOptimizer:
        torch.manual_seed(0)
        a, b = torch.nn.Parameter(torch.randn(5, 5)), torch.nn.Parameter(torch.randn(9))
        return CombinedOptimizer(torch.optim.SGD([a], lr=0.1, momentum=0.9), torch.optim.AdamW([b], lr=0.01))

    ours, theirs = both(), both()
    predictor = Predictor(ours)
    out = [torch.empty_like(w.detach()) for w in weights_of(ours)]
    for update in range(3):
        for optimizer in (ours, theirs):
            give_gradients(optimizer, update)
        theirs.step()
        if not predictor.fused_step(out, 2):
            assert update == 0
            ours.step()
    close(weights_of(ours), weights_of(theirs))
    assert all(torch.equal(a, b) for a, b in zip(out, predict_weights(ours, 2), strict=True))


def test_infinite_weights_without_decay_stay_infinite() -> None:
    weight = torch.nn.Parameter(torch.tensor([float("inf"), 1.0]))
    weight.grad = torch.ones(2)
    optimizer = torch.optim.SGD([weight], lr=0.5)
    out = [torch.empty(2)]
    assert Predictor(optimizer).fused_step(out, 2)
    assert weight.tolist() == [float("inf"), 0.5] and out[0].tolist() == [float("inf"), -0.5]


def grads_of(optimizer: Optimizer) -> list[Tensor]:
    return [weight.grad for weight in weights_of(optimizer) if weight.grad is not None]


FILLED = ("plain", "channels_last", "transposed", "scalar", "empty", "large")


def give_own_gradients(optimizer: Optimizer, seed: int) -> None:
    """As a backward leaves them: each in memory of its own."""
    give_gradients(optimizer, seed)
    for weight in weights_of(optimizer):
        assert weight.grad is not None
        weight.grad = torch.empty_like(weight.detach()).copy_(weight.grad)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_predictions_over_the_gradients_are_those_in_buffers(name: str, kind: str) -> None:
    if kind == "decayed" and "adagrad" in name:
        return
    ours, theirs = make(name, FILLED), make(name, FILLED)
    over, into = Predictor(ours, kind=kind), Predictor(theirs, kind=kind)
    out = [torch.empty_like(w.detach()) for w in weights_of(theirs)]
    done = 0
    for update in range(BY_TORCH.get(name, 1) + 3):
        give_own_gradients(ours, update)
        give_gradients(theirs, update)
        places = [grad.data_ptr() for grad in grads_of(ours)]
        expected = into.fused_step(out, 3)
        found = over.fused_step_over_gradients(3)
        if found is None:
            assert not expected or over.needs_grad
            assert len(grads_of(ours)) == len(FILLED)
            if not over.fused_step([torch.empty_like(w.detach()) for w in weights_of(ours)], 3):
                ours.step()
                theirs.step()
            continue
        done += 1
        assert expected and [t.data_ptr() for t in found] == places and not grads_of(ours)
        assert all(map(torch.equal, found, out)) and all(map(torch.equal, weights_of(ours), weights_of(theirs)))
        for mine, other in zip(ours.state.values(), theirs.state.values(), strict=True):
            assert all(torch.equal(mine[key], other[key]) for key in mine if isinstance(mine[key], Tensor))
        over.after_step()
        into.after_step()
        assert over.still_holds(3)
        later = [[torch.empty_like(b) for b in out] for _ in range(2)]
        over.predict_into(later[0], 5)
        into.predict_into(later[1], 5)
        assert all(map(torch.equal, *later))
    assert done == (0 if over.needs_grad else 3)


def kept_by_a_hook(weights: list[Tensor]) -> Any:
    return weights[0].grad


def kept_as_a_view(weights: list[Tensor]) -> Any:
    assert weights[0].grad is not None
    return weights[0].grad.view(-1)


def kept_by_a_graph(weights: list[Tensor]) -> Any:
    assert weights[0].grad is not None
    return torch.ones((), requires_grad=True) * weights[0].grad


def in_a_bucket(weights: list[Tensor]) -> Any:
    for weight in weights:
        assert weight.grad is not None
        weight.grad = torch.zeros(weight.numel() + 9)[: weight.numel()].view(weight.shape).copy_(weight.grad)


def missing(weights: list[Tensor]) -> Any:
    weights[0].grad = None


def shared(weights: list[Tensor]) -> Any:
    weights[0].grad = weights[1].grad


@pytest.mark.parametrize("change", [kept_by_a_hook, kept_as_a_view, kept_by_a_graph, in_a_bucket, missing, shared])
def test_gradients_that_somebody_else_has_are_left_alone(change: Any) -> None:
    optimizer = make("adamw", ("plain", "plain"))
    give_gradients(optimizer, 0)
    optimizer.step()
    predictor = Predictor(optimizer)
    give_own_gradients(optimizer, 1)
    kept = change(weights_of(optimizer))
    before = [w.detach().clone() for w in [*weights_of(optimizer), *grads_of(optimizer)]]
    assert predictor.fused_step_over_gradients(2) is None
    assert all(map(torch.equal, before, [*weights_of(optimizer), *grads_of(optimizer)]))
    del kept
    give_own_gradients(optimizer, 2)
    assert predictor.fused_step_over_gradients(2) is not None


def test_a_copy_is_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    for streamed in (0, 1 << 60):
        monkeypatch.setattr(calls, "STREAM_FROM", streamed)
        sources = [torch.randn(100_003), torch.tensor([float("inf"), float("nan"), -0.0]), torch.randn(20)[3:]]
        targets = [torch.empty_like(s) for s in sources]
        calls.copy_tensors(sources, targets)
        assert all(a.numpy().tobytes() == b.contiguous().numpy().tobytes() for a, b in zip(targets, sources, strict=True))
