"""What happens around the optimizer step: schedules, averages, several optimizers, state that plain PyTorch understands."""

import copy
import math

import pytest
import torch
from torch import nn

import pipeoptim as po
from pipeoptim.rules.combined import CombinedOptimizer

WIDTH = 6
loss_fn = nn.functional.mse_loss


def layers(n, dtype=torch.float64):
    torch.manual_seed(1)
    return [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()).to(dtype) for _ in range(n)]


def data(n, batch=4, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return [tuple(torch.randn(batch, WIDTH, generator=g, dtype=dtype) for _ in "xy") for _ in range(n)]


def momentum(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def weights(stages):
    return torch.cat([p.detach().flatten() for s in stages for p in s.parameters()])


@pytest.mark.parametrize("method", ["pipeoptim", "pipedream", "1f1b"])
@pytest.mark.parametrize("m", [1, 2])
def test_warm_up_and_cosine_advance_once_per_update_on_every_stage(method, m):
    """The rate of update t is the closed form at t on every stage, though the stages make it at different times."""
    used = {k: [] for k in range(3)}

    def make(params):
        optimizer = momentum(params)
        k = len(made)
        made.append(optimizer)
        optimizer.register_step_pre_hook(lambda o, *_: used[k].append(o.param_groups[0]["lr"]))
        return optimizer

    def warm_cosine(optimizer):
        warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.25, total_iters=4)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
        return torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], [4])

    made = []
    pipe = po.Emulator(layers(3), make, loss_fn, method, m, schedulers=warm_cosine)
    for x, y in data(10):
        pipe.step(x, target=y)
    pipe.drain()
    expected = [0.1 * (0.25 + 0.75 * t / 4) if t < 4 else 0.05 * (1 + math.cos(math.pi * (t - 4) / 8)) for t in range(10)]
    for k in range(3):
        assert used[k] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("method", ["pipeoptim", "pipedream_2bw", "gpipe"])
def test_averaged_weights_equal_the_average_by_hand(method):
    stages = layers(3)
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.8)
    models = [torch.optim.swa_utils.AveragedModel(s, multi_avg_fn=average) for s in stages]
    history = {k: [] for k in range(3)}

    def hook(k, version):
        history[k].append((version, weights([stages[k]])))
        models[k].update_parameters(stages[k])

    pipe = po.Emulator(stages, momentum, loss_fn, method, 4, on_update=hook)
    for x, y in data(7):
        pipe.step(x, target=y)
    pipe.drain()
    for k in range(3):
        assert [version for version, _ in history[k]] == list(range(1, 8))
        by_hand = history[k][0][1]
        for _, w in history[k][1:]:
            by_hand = 0.8 * by_hand + 0.2 * w
        torch.testing.assert_close(weights([models[k].module]), by_hand, rtol=0, atol=1e-12)
        assert torch.equal(history[k][-1][1], weights([stages[k]]))


def test_the_hook_sees_the_latest_weights_while_others_are_in_flight():
    """An update that the hook sees is what the next plain update starts from: no predicted weights are in the module."""
    stages, seen = layers(4), []
    pipe = po.Emulator(
        stages, lambda p: torch.optim.SGD(p, lr=0.1), loss_fn, on_update=lambda k, v: seen.append((k, v, weights([stages[k]])))
    )
    for x, y in data(9):
        pipe.step(x, target=y)
        for k in range(4):
            mine = [w for j, v, w in seen if j == k]
            assert len(mine) == pipe.version(k)
            assert not mine or torch.equal(mine[-1], weights([stages[k]]))


MAKERS = [
    momentum,
    lambda p: torch.optim.AdamW(p, lr=0.01),
    lambda p: torch.optim.Adagrad(p, lr=0.05),
    lambda p: torch.optim.NAdam(p, lr=0.01),
]


def test_different_optimizers_on_different_stages_equal_the_unpipelined_model():
    stages = layers(4)
    plain = copy.deepcopy(stages)
    optimizers = [make(s.parameters()) for make, s in zip(MAKERS, plain, strict=True)]
    pipe = po.Emulator(stages, [make(s.parameters()) for make, s in zip(MAKERS, stages, strict=True)], loss_fn, "1f1b", 2)
    for x, y in data(8):
        pipe.step(x, target=y)
        loss_fn(nn.Sequential(*plain)(x), y).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(weights(stages), weights(plain), rtol=0, atol=1e-12)


def split(params):
    """Matrices to one optimizer, the rest to another."""
    params = list(params)
    muon = torch.optim.Muon([p for p in params if p.ndim == 2], lr=0.02)
    return muon, torch.optim.AdamW([p for p in params if p.ndim != 2], lr=0.01)


def test_two_optimizers_on_one_stage_equal_the_unpipelined_model():
    stages = layers(3, torch.float32)
    plain = copy.deepcopy(stages)
    pairs = [split(s.parameters()) for s in plain]
    pipe = po.Emulator(stages, lambda p: CombinedOptimizer(*split(p)), loss_fn, "gpipe", clip=po.Clip(0.1, "global"))
    for x, y in data(6, dtype=torch.float32):
        pipe.step(x, target=y)
        model = nn.Sequential(*plain)
        loss_fn(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        for optimizer in [o for pair in pairs for o in pair]:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(weights(stages), weights(plain), rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", MAKERS)
def test_optimizer_state_moves_between_the_pipeline_and_plain_pytorch(make):
    """Save in the pipeline, go on in plain PyTorch, come back; the same as never having left (a flush method: no gap)."""
    stages, never = layers(2, torch.float32), layers(2, torch.float32)
    pipe = po.Emulator(stages, make, loss_fn, "1f1b")
    stayed = po.Emulator(never, make, loss_fn, "1f1b")
    batches = data(9, dtype=torch.float32)
    for x, y in batches[:3]:
        pipe.step(x, target=y)
    states = copy.deepcopy([pipe.stage_state_dict(k)["optimizer"] for k in range(2)])
    model = nn.Sequential(*copy.deepcopy(stages))
    optimizers = [make(s.parameters()) for s in model]
    for optimizer, state in zip(optimizers, states, strict=True):
        assert state.keys() == optimizer.state_dict().keys()
        optimizer.load_state_dict(state)
    for x, y in batches[3:6]:
        loss_fn(model(x), y).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    back = copy.deepcopy(list(model))
    last = [make(s.parameters()) for s in back]
    for optimizer, state in zip(last, optimizers, strict=True):
        optimizer.load_state_dict(state.state_dict())
    again = po.Emulator(back, last, loss_fn, "1f1b")
    for x, y in batches[6:]:
        again.step(x, target=y)
    for x, y in batches:
        stayed.step(x, target=y)
    assert torch.equal(weights(back), weights(never))
