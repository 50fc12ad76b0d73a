"""Dry steps in one pass: the weights that the fused step then makes, bit for bit; those of the plain path to float32 rounding."""

from __future__ import annotations

import copy
import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.optim import Optimizer

from pipeoptim.kernels import available, calls
from pipeoptim.rules import ClipEstimate, CombinedOptimizer, Horizon, PartialGradient, Predictor, predict_weights
from pipeoptim.rules.entries import parameter_entries
from pipeoptim.rules.estimate import GradientEstimate, momentum_of
from pipeoptim.rules.lr import next_rates
from pipeoptim.rules.rule_moves import predict_by_rule
from test_kernels_fused import BY_TORCH, FORMS, OPTIONS, close, copy_of, give_gradients, make, weights_of

pytestmark = pytest.mark.skipif(not available(), reason="no C compiler")

ROUNDS_OTHERWISE = ("sgd_decay", "nesterov")  # the step adds decay and gradient up first, a move does not


class Run:
    """An optimizer after some steps by its kernel, and gradients of the next update."""

    def __init__(self, name: str, forms: tuple[str, ...] = FORMS, updates: int = 7) -> None:
        self.optimizer = make(name, forms)
        self.predictor = Predictor(self.optimizer, kind="in_progress")
        self.out = [copy_of(w.detach()) for w in weights_of(self.optimizer)]
        for update in range(updates):
            give_gradients(self.optimizer, update)
            self.predictor.step()
        give_gradients(self.optimizer, 99)
        self.grads = [w.grad for w in weights_of(self.optimizer)]

    def known(self, seen: float) -> list[PartialGradient | None]:
        return [PartialGradient(g, seen) for g in self.grads]

    def plain(
        self, steps: int, known: list[PartialGradient | None], clip: ClipEstimate | None, scales: tuple[float, ...]
    ) -> list[Tensor]:
        out = [torch.empty_like(w) for w in self.out]
        horizon = Horizon(steps, next_rates(self.optimizer, None, steps), scales, known, clip)
        predict_by_rule(parameter_entries(self.optimizer, "in_progress"), [None] * len(out), horizon, out)
        return out


@pytest.fixture
def kernel_runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of every call of a kernel how many parameters it took."""
    used: list[int] = []
    for name in ("run", "dry"):
        original = getattr(calls.MultiTensorStep, name)
        note = lambda self, *how, f=original: (used.append(len(how[1])), f(self, *how))[1]  # noqa: E731
        monkeypatch.setattr(calls.MultiTensorStep, name, note)
    return used


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_with_the_whole_mini_batch_it_is_the_fused_step_bit_for_bit(name: str, kernel_runs: list[int]) -> None:
    run = Run(name)
    kernel_runs.clear()
    state = copy.deepcopy(run.optimizer.state_dict())
    run.predictor.predict_into(run.out, 1, run.known(1.0))
    for one, other in zip(state["state"].values(), run.optimizer.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(value, other[key]) for key, value in one.items() if isinstance(value, Tensor))
    run.predictor.step()
    assert kernel_runs == [len(FORMS), len(FORMS)]
    if name in ROUNDS_OTHERWISE:
        close(run.out, weights_of(run.optimizer))
    else:
        assert all(torch.equal(a, b.detach()) for a, b in zip(run.out, weights_of(run.optimizer), strict=True))


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_it_is_the_plain_path_to_rounding(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(OPTIONS)), label="name")
    forms = data.draw(st.lists(st.sampled_from(FORMS[:-1]), min_size=1, max_size=4), label="forms")
    run = Run(name, tuple(forms), data.draw(st.integers(1, 8), label="updates"))
    seen, steps = data.draw(st.sampled_from([0.0, 0.125, 0.75, 1.0]), label="seen"), data.draw(st.integers(1, 4), label="steps")
    known = run.known(seen)
    if data.draw(st.booleans(), label="one not reached"):
        known[0] = PartialGradient(None, seen)
    factor = data.draw(st.sampled_from([1.0, 0.25]), label="factor")
    known = [None if k is None else PartialGradient(k.value, k.seen, factor) for k in known]
    own = ClipEstimate(max_norms=torch.linspace(0.1, 3.0, len(known)))
    clip = data.draw(
        st.sampled_from([None, ClipEstimate(0.5), ClipEstimate(1e6), ClipEstimate(last_factor=0.5), own]), label="clip"
    )
    run.predictor.scales = (data.draw(st.sampled_from([1.0, 0.5]), label="scale"),) * len(run.optimizer.param_groups)
    run.predictor.predict_into(run.out, steps, known, clip)
    close(run.out, run.plain(steps, known, clip, run.predictor.scales), units=16)


def test_every_change_that_a_plan_cannot_survive_is_noticed(kernel_runs: list[int]) -> None:
    run = Run("adamw")
    first = weights_of(run.optimizer)[0]

    def check(calls_of_kernel: int) -> None:
        kernel_runs.clear()
        run.predictor.predict_into(run.out, 2, run.known(0.5))
        assert len(kernel_runs) == calls_of_kernel
        close(run.out, run.plain(2, run.known(0.5), None, ()), units=16)

    check(1)
    run.optimizer.state[first]["exp_avg"] = torch.ones_like(first)  # another tensor
    check(1)
    run.optimizer.param_groups[0]["amsgrad"] = True  # an option that the kernel lacks
    for p in run.optimizer.param_groups[0]["params"]:
        run.optimizer.state[p]["max_exp_avg_sq"] = run.optimizer.state[p]["exp_avg_sq"].clone()
    check(0)
    run.optimizer.param_groups[0]["amsgrad"] = False
    check(1)
    run.optimizer.param_groups[0]["lr"] = 0.3
    check(1)
    run.grads[0] = run.grads[0].double()  # type: ignore[union-attr]
    check(0)


def test_parameters_that_no_kernel_takes_are_predicted_beside_those_that_one_does(kernel_runs: list[int]) -> None:
    torch.manual_seed(0)
    matrix, *rest = (torch.nn.Parameter(torch.randn(shape)) for shape in ((4, 3), (5,), (2, 3)))
    optimizer: Optimizer = CombinedOptimizer(torch.optim.Muon([matrix], lr=0.1), torch.optim.AdamW(rest, lr=0.1))
    for update in range(3):
        give_gradients(optimizer, update)
        optimizer.step()
    known = [PartialGradient(w.grad, 0.5) for w in weights_of(optimizer)]
    for clip in (None, ClipEstimate(0.1)):
        got = predict_weights(optimizer, 1, kind="in_progress", in_progress=known, clip=clip)
        out = [torch.empty_like(w) for w in got]
        horizon = Horizon(1, next_rates(optimizer, None, 1), (), known, clip)
        predict_by_rule(parameter_entries(optimizer, "in_progress"), [None] * 3, horizon, out)
        close(got, out, units=16)
    assert kernel_runs == [2, 2]


@pytest.mark.parametrize("clip", [None, ClipEstimate(0.5), ClipEstimate(last_factor=0.5)])
@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_as_gradients_grow_it_is_made_anew_with_the_same_bits(
    name: str, clip: ClipEstimate | None, kernel_runs: list[int]
) -> None:
    run = Run(name)
    # Of the first one nothing is known but the mean of its gradients, where there is one.
    hidden = int(momentum_of(parameter_entries(run.optimizer, "in_progress")[0]) is not None)
    grads: list[Tensor | None] = [*[None] * hidden, *run.grads[hidden:]]
    known = lambda seen: [None if g is None else PartialGradient(g, seen, 0.5) for g in grads]  # noqa: E731
    run.predictor.predict_into(run.out, 2, known(0.25), clip)
    growing, again = run.predictor.growing, [torch.empty_like(w) for w in run.out]
    assert growing is not None
    taken = iter([[copy_of(w) for w in run.out], run.out, run.out])
    users = [*map(sys.getrefcount, run.grads)]
    for seen in (0.25, 0.5, 1.0):
        torch._foreach_mul_(run.grads, 1.0 + seen)
        kernel_runs.clear()
        if not growing(buffers := next(taken), grads, seen, 0.5, clip):
            assert seen == 1.0 and hidden  # without a gradient in the whole mini-batch a parameter stays
            continue
        assert kernel_runs == []  # packed once
        run.predictor.predict_into(again, 2, known(seen), clip)
        assert all(torch.equal(a, b) for a, b in zip(buffers, again, strict=True))
    assert [*map(sys.getrefcount, run.grads)] == users  # it keeps none of them alive
    moved: list[list[Tensor | None]] = [[*grads[:1], other, *grads[2:]] for other in (copy_of(run.grads[1]), None)]
    assert not any(growing(run.out, other, 0.5, 0.5, clip) for other in moved) and not growing(run.out, grads, 0.0, 0.5, clip)


def test_the_first_update_is_torchs(kernel_runs: list[int]) -> None:
    """No state yet: the optimizer's own step runs on copies."""
    for name in sorted(OPTIONS):
        optimizer = make(name, ("plain", "transposed"))
        give_gradients(optimizer, 0)
        kernel_runs.clear()
        known = [PartialGradient(w.grad, 1.0) for w in weights_of(optimizer)]
        got = predict_weights(optimizer, 1, kind="in_progress", in_progress=known)
        assert bool(kernel_runs) == (BY_TORCH.get(name) == 0)
        optimizer.step()
        close(got, weights_of(optimizer))


@pytest.mark.parametrize("threads", [1, 3])
def test_norms_do_not_depend_on_threads_and_are_those_of_float64(threads: int) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(n) for n in (0, 1, 7, 70_001, 200_003)]
    factors = calls.EstimateFactors(0.5, -0.25, 0.125)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        parts = [calls.EstimateParts(t.numel(), t.data_ptr(), t.data_ptr(), t.data_ptr(), factors) for t in tensors]
        found = calls.norm_of_estimates(parts)
        torch.set_num_threads(1)
        assert found == calls.norm_of_estimates(parts)
    finally:
        torch.set_num_threads(before)
    assert found == pytest.approx(0.375 * math.sqrt(sum(float(t.double().square().sum()) for t in tensors)), rel=1e-7)


@pytest.mark.parametrize("of_mean", [0.0, 0.5])
@pytest.mark.parametrize("of_weight", [0.0, 0.125])
def test_the_norm_of_infinite_gradients_is_infinite_as_the_plain_path_says(of_mean: float, of_weight: float) -> None:
    for place in (3, 17):  # within what is summed side by side, and behind it
        value, other = torch.ones(18), torch.ones(18)
        value[place] = math.inf
        factors = calls.EstimateFactors(0.5, of_mean, of_weight)
        part = calls.EstimateParts(18, value.data_ptr(), other.data_ptr(), other.data_ptr(), factors)
        plain = GradientEstimate(value, 0.5, other, of_mean, of_weight).tensor(other).norm()
        assert calls.norm_of_estimates([part]) == float(plain) == math.inf
        assert ClipEstimate(max_norm=1.0).factor(math.inf) == float((1 / (plain + 1e-6)).clamp(max=1.0)) == 0


def test_large_predictions_bypass_the_caches_with_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("adamw", "momentum"):
        results = []
        for limit in (1 << 40, 0):
            monkeypatch.setattr(calls, "STREAM_FROM", limit)
            run = Run(name)
            run.predictor.predict_into(run.out, 1, run.known(0.5))
            results.append(run.out)
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
