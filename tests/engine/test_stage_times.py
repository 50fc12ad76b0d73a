"""Stage times are measured all the time, slow stages are told, and slack="auto" is chosen from what was measured."""

from pathlib import Path

import pytest
import torch

import pipeoptim as po
import stage_processes
from pipeoptim.bench.processes import BANDWIDTH, DELAY
from pipeoptim.engine import pipeline, runner
from pipeoptim.engine.auto_slack import MOST, StageMeasurement, choose_slack
from pipeoptim.engine.stage_times import WINDOW, StageTimes
from pipeoptim.telemetry.timing import SlowStages

HERE = Path(__file__).parent


class Clock:
    """A clock that goes on only where it is told to."""

    time = 0.0

    def __call__(self):
        return self.time


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(runner, "now", clock)
    monkeypatch.setattr(pipeline, "now", clock)
    return clock


class Timed(torch.nn.Linear):
    """A layer whose forward takes so many seconds on ``clock``."""

    def __init__(self, clock, seconds):
        super().__init__(4, 4)
        self.clock, self.seconds = clock, seconds

    def forward(self, x):
        self.clock.time += self.seconds
        return super().forward(x)


def emulator(stages, **options):
    return po.Emulator(stages, lambda p: torch.optim.SGD(p, lr=0.1), torch.nn.functional.mse_loss, **options)


def test_what_a_stage_takes_is_measured_and_what_has_become_slow_is_told(clock):
    pipe, x, slow = emulator([Timed(clock, 2.0), Timed(clock, 1.0)]), torch.ones(4, 4), SlowStages()
    for _ in range(WINDOW + 1):
        pipe.step(x, target=x)
        assert pipe.stage_times(0) is None
    pipe.step(x, target=x)
    first = [pipe.stage_times(k) for k in range(2)]
    assert first == [StageTimes(k, 2.0 - k, 0.0, 3.0, 0.0, 1.0, 1.0) for k in range(2)]
    assert slow.note(first) == []
    pipe.stage_module(0).seconds = 3.0
    for n in range(WINDOW):
        clock.time += 50.0 * (n == 5)  # one pause does not count
        pipe.step(x, target=x)
    now = [pipe.stage_times(k) for k in range(2)]
    assert now == [StageTimes(0, 3.0, 0.0, 4.0, 0.0, 1.5, 4 / 3), StageTimes(1, 1.0, 0.0, 4.0, 0.0, 1.0, 4 / 3)]
    assert slow.note(now) == [
        "stage 0 has become slow: a mini-batch takes it 3.00 s, 1.50 times as long as at first; steps take 1.33 times as long"
    ]
    assert slow.note(now) == []
    again = [StageTimes(0, 0.002, 0.0, 0.003, 0.0, 1.05, 1.0)]
    assert slow.note(again) == ["stage 0 is as fast as at first again (2 ms per mini-batch)"]
    pipe.set_microbatches(2)
    pipe.step(x, target=x)
    assert pipe.stage_times(0) is None  # cut another way: nothing to compare with yet


def test_what_all_stages_share_is_not_held_against_one_of_them():
    def stages(*slowed):
        return [StageTimes(k, 0.01 * factor, 0.0, 0.01, 0.0, factor, factor) for k, factor in enumerate(slowed)]

    slow = SlowStages()
    assert slow.note(stages(1.3, 1.25, 1.4)) == [
        "all stages have become slow, each takes at least 1.25 times as long as at first: something else may use the machine"
    ]
    assert slow.note(stages(1.3, 1.25, 1.4)) == []
    [text] = slow.note(stages(1.3, 1.25, 1.6))
    assert text.startswith("stage 2 has become slow: a mini-batch takes it 16 ms, 1.60 times as long")
    assert slow.note(stages(1.05, 1.0, 1.6)) == ["not all stages are slow any more"]
    assert slow.note(stages(1.05, 1.0, 1.0)) == ["stage 2 is as fast as at first again (10 ms per mini-batch)"]


def test_slack_is_chosen_by_round_trips_jitter_and_the_slowest_stage():
    def stage(computing, spread=0.0, previous=0.0, following=0.0):
        return StageMeasurement(computing, spread, previous, following)

    three = [stage(0.01, following=0.003), stage(0.02, 0.0, 0.003, 0.011), stage(0.01, 0.0, 0.011)]
    assert choose_slack(three, interleaved=False) == (1.0, 2.0)  # 6 ms and 22 ms of 20 ms
    assert choose_slack(three, interleaved=True) == 2.0
    assert choose_slack([stage(0.01, 0.003), stage(0.01, 0.001)], interleaved=False) == (1.0,)  # jitter alone
    assert choose_slack([stage(0.01, 0.0001, 0.0, 1e-4), stage(0.01, 0.0, 1e-4)], interleaved=False) == (0.0,)
    assert choose_slack([stage(0.001, following=1.0), stage(0.001, 0.0, 1.0)], interleaved=False) == (MOST,)
    assert choose_slack([stage(0.01)], interleaved=False) == ()


def test_processes_choose_the_same_slack_on_slow_links_and_a_resumed_run_keeps_it(tmp_path, monkeypatch):
    delay = 0.03
    monkeypatch.setenv(DELAY, str(delay))
    monkeypatch.setenv(BANDWIDTH, "0")
    stage_processes.run(HERE / "auto_slack_worker.py", 2, str(tmp_path), "0.015")
    found = [torch.load(tmp_path / f"{k}.pt", weights_only=True) for k in range(2)]
    assert found[0]["slack"] == found[1]["slack"]
    assert 1 <= found[0]["slack"][0] <= 2 * delay / 0.015 + 3
    # The emulator: without slack up to where it was chosen, then with it.
    at, slack = WINDOW + 2 + 2, found[0]["slack"]

    def made(**options):
        stages = []
        for k in range(2):
            torch.manual_seed(k)
            stages.append(torch.nn.Linear(4, 4))
        return po.Emulator(stages, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), torch.nn.functional.mse_loss, **options)

    pipe, state = made(seed=0), None
    for n in range(50):
        if n in (20, at, 44):
            pipe.drain()
        if n == at:
            state = [pipe.stage_state_dict(k) for k in range(2)]
            pipe = made(seed=0, slack=slack)
            for k in range(2):
                pipe.load_stage_state_dict(k, state[k])
        x = torch.full((2, 4), 1.0 / (n + 1))
        pipe.step(x, target=x)
    pipe.drain()
    for k in range(2):
        for p, w in zip(pipe.stage_module(k).parameters(), found[k]["weights"], strict=True):
            assert torch.equal(p, w)


def test_where_nothing_can_be_measured_auto_is_refused():
    with pytest.raises(po.ConfigError, match="an emulator has no links"):
        emulator([torch.nn.Linear(4, 4)], slack="auto")
    with pytest.raises(po.ConfigError, match="slack is 'automatic'"):
        emulator([torch.nn.Linear(4, 4)], slack="automatic")
