"""The learning rates of the next updates: a rolled copy must give what the real scheduler will give."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as S

from pipeoptim.errors import ConfigError
from pipeoptim.rules import predict_weights
from pipeoptim.rules.lr import next_rates
from rules_cases import BY_NAME, largest_difference, really_stepped, train, weights_of


class Counting:
    """A stateful learning-rate function."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, epoch: int) -> float:
        self.calls += 1
        return 0.9**self.calls


class OwnMethod(S.LRScheduler):
    """A scheduler that keeps a bound method of itself, and a list that it changes."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.seen: list[int] = []
        self.rule = self._rule
        super().__init__(optimizer)

    def _rule(self) -> float:
        self.seen.append(self.last_epoch)
        return 0.1 / (1 + len(self.seen))

    def get_lr(self) -> list[float]:
        return [self.rule() for _ in self.optimizer.param_groups]


def sequential(o: torch.optim.Optimizer) -> S.LRScheduler:
    return S.SequentialLR(o, [S.LinearLR(o, 0.1, total_iters=4), S.CosineAnnealingLR(o, 9), S.StepLR(o, 2)], [4, 7])


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "StepLR": lambda o: S.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: S.MultiStepLR(o, [2, 5, 5], 0.3),
    "CosineAnnealingLR": lambda o: S.CosineAnnealingLR(o, 7, 0.001),
    "CosineAnnealingWarmRestarts": lambda o: S.CosineAnnealingWarmRestarts(o, 4),
    "LambdaLR": lambda o: S.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "LambdaLR_stateful": lambda o: S.LambdaLR(o, [Counting(), Counting()]),
    "MultiplicativeLR": lambda o: S.MultiplicativeLR(o, lambda epoch: 0.9 if epoch % 2 else 1.1),
    "OneCycleLR": lambda o: S.OneCycleLR(o, 0.5, total_steps=20),
    "CyclicLR": lambda o: S.CyclicLR(o, 0.01, 0.1, 3, mode="exp_range", gamma=0.9),
    "LinearLR": lambda o: S.LinearLR(o, 0.1, total_iters=6),
    "ConstantLR": lambda o: S.ConstantLR(o, 0.1, total_iters=6),
    "ExponentialLR": lambda o: S.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: S.PolynomialLR(o, 10, 2.0),
    "SequentialLR": sequential,
    "ChainedScheduler": lambda o: S.ChainedScheduler([S.CosineAnnealingLR(o, 9), S.ExponentialLR(o, 0.9)]),
    "own_method": OwnMethod,
}


def make(name: str, **tensor: Any) -> tuple[torch.optim.Optimizer, Any]:
    weights = [torch.nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(2)]
    lr = torch.tensor(0.1, dtype=torch.float64) if tensor.get("tensor") else 0.1
    groups = [{"params": weights[:1], "lr": copy.deepcopy(lr)}, {"params": weights[1:], "lr": copy.deepcopy(lr) * 0.5}]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    return optimizer, SCHEDULERS[name](optimizer)


def rates_of(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def test_all_of_torch_is_in_the_table() -> None:
    assert set(S.__all__) - {"LRScheduler", "ReduceLROnPlateau"} <= set(SCHEDULERS)


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_rolled_rates_equal_really_stepping(name: str, tensor: bool) -> None:
    optimizer, scheduler = make(name, tensor=tensor)
    optimizer.step()
    for _ in range(9):
        before = copy.deepcopy(vars(scheduler) | {"optimizer": None}) if name != "own_method" else None
        groups = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            predicted = next_rates(optimizer, scheduler, 6)
        assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == groups
        if (
            before is not None
            and not name.startswith("Lambda")
            and name not in ("SequentialLR", "ChainedScheduler", "MultiplicativeLR")
        ):
            assert {k: v for k, v in vars(scheduler).items() if k != "optimizer" and not callable(v)} == {
                k: v for k, v in before.items() if k != "optimizer" and not callable(v)
            }
        # the oracle: the real thing, on a deep copy of optimizer and scheduler together
        other, real = make(name, tensor=tensor)
        other.step()
        for _ in range(scheduler.last_epoch if hasattr(scheduler, "last_epoch") else scheduler._schedulers[0].last_epoch):
            real.step()
        for ahead in range(6):
            assert [rates[ahead] for rates in predicted] == pytest.approx(rates_of(other), rel=1e-12)
            real.step()
        scheduler.step()


def test_stateful_function_is_not_advanced() -> None:
    optimizer, scheduler = make("LambdaLR_stateful")
    calls = [f.calls for f in scheduler.lr_lambdas]
    next_rates(optimizer, scheduler, 5)
    assert [f.calls for f in scheduler.lr_lambdas] == calls


def test_past_the_end_of_a_schedule_the_last_rate_is_held() -> None:
    optimizer, scheduler = make("OneCycleLR")
    optimizer.step()
    for _ in range(18):
        scheduler.step()
    rates = next_rates(optimizer, scheduler, 5)[0]
    assert rates[0] > rates[1] > 0
    assert rates[2] == rates[3] == rates[4]  # torch allows one step beyond total_steps, then raises
    for _ in range(2):
        scheduler.step()
    with pytest.raises(ValueError, match="Tried to step"):
        scheduler.step()


def test_plateau_and_no_scheduler_hold_the_present_rate() -> None:
    optimizer, _ = make("StepLR")
    plateau = S.ReduceLROnPlateau(optimizer)
    assert next_rates(optimizer, plateau, 3) == [(0.1,) * 3, (0.05,) * 3]
    assert next_rates(optimizer, None, 0) == [(), ()]


def test_scheduler_of_another_optimizer_is_refused() -> None:
    optimizer, _ = make("StepLR")
    _, other = make("StepLR")
    with pytest.raises(ConfigError, match="drives another optimizer"):
        predict_weights(optimizer, 2, scheduler=other)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_prediction_uses_the_coming_rates_and_paper_the_present_one(name: str) -> None:
    optimizer = BY_NAME[name].make()
    scheduler = S.StepLR(optimizer, 2, 0.1)
    train(optimizer, 1, constant=True)
    scheduler.step()
    rates = [rate for group in next_rates(optimizer, scheduler, 4) for rate in group]
    assert rates == pytest.approx([rates[0], *(rates[0] * r for r in (0.1, 0.1, 0.01))])

    def set_rate(twin: torch.optim.Optimizer, step: int) -> None:
        twin.param_groups[0]["lr"] = rates[step]

    real = really_stepped(optimizer, 4, before_each=set_rate)
    assert largest_difference(predict_weights(optimizer, 4, scheduler=scheduler), real) < 1e-10
    constant = really_stepped(optimizer, 4)
    assert largest_difference(predict_weights(optimizer, 4, kind="paper", scheduler=scheduler), constant) < 1e-10


def test_decayed_weighs_each_step_with_its_own_rate() -> None:
    optimizer = BY_NAME["sgd_momentum"].make()
    scheduler = S.ExponentialLR(optimizer, 0.5)
    train(optimizer, 2)
    coefficient = sum(0.1 * 0.5 ** (i - 1) * 0.8**i for i in (1, 2, 3))
    for got, w in zip(predict_weights(optimizer, 3, kind="decayed", scheduler=scheduler), weights_of(optimizer), strict=True):
        torch.testing.assert_close(got, w.detach() - coefficient * optimizer.state[w]["momentum_buffer"], rtol=0, atol=1e-14)


def test_rolling_does_not_depend_on_the_size_of_the_optimizer() -> None:
    """No copy of the state: rolling with 40 MB of state costs what it costs with none (a wide margin, for a busy machine)."""
    big = torch.optim.SGD([torch.nn.Parameter(torch.zeros(10_000_000))], lr=0.1, momentum=0.9)
    big.param_groups[0]["params"][0].grad = torch.ones(10_000_000)
    big.step()
    scheduler = S.CosineAnnealingLR(big, 100)
    fastest = min(_seconds(lambda: next_rates(big, scheduler, 8)) for _ in range(20))
    assert fastest < 2e-3


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
