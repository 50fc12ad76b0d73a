"""Small runs with every part of a training loop, built alike by the emulator's test and by one process per stage."""

import torch
from torch import nn

import pipeoptim as po

DEPTH, UPDATES, BATCH, WIDTH = 4, 24, 12, 8
DRAIN_AT, EVALUATE_AT = 12, 17


class Spike(nn.Module):
    """Passes through; its gradient is infinite at the given calls, which the sending stage has not seen."""

    def __init__(self, at):
        super().__init__()
        self.at, self.calls = set(at), 0

    def forward(self, x):
        self.calls += self.training
        if self.calls in self.at and x.requires_grad:
            x = x * 1
            x.register_hook(lambda g: g + float("inf"))
        return x


def module(k, spikes=()):
    """Stage k; every stage is made from its own seed, so that a process can make its own alone."""
    torch.manual_seed(100 + k)
    parts = [nn.Linear(WIDTH, WIDTH), Spike(spikes if k == 1 else ()), nn.Tanh(), nn.Dropout(0.1), nn.Linear(WIDTH, WIDTH)]
    return nn.Sequential(*parts)


def batches(dtype):
    g = torch.Generator().manual_seed(1)
    for _ in range(UPDATES):
        x, y = torch.randn(BATCH, WIDTH, generator=g), torch.randn(BATCH, WIDTH, generator=g)
        yield x.to(dtype), y.to(dtype)


def loss_fn(output, target):
    return nn.functional.mse_loss(output, target)


def adamw(params, k):
    return torch.optim.AdamW(params, lr=0.01)


def mixed(params, k):
    """Another optimizer on every stage."""
    return [
        lambda: torch.optim.SGD(params, lr=0.05, momentum=0.9),
        lambda: torch.optim.Adagrad(params, lr=0.02),
        lambda: torch.optim.NAdam(params, lr=0.01),
        lambda: torch.optim.RMSprop(params, lr=0.003),
    ][k]()


def warm_cosine(optimizer):
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, UPDATES)
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], [5])


def scaler():
    return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=5)


# name -> method, M, optimizer, options of the engine, type of the module, calls with an infinite gradient
CASES = {
    "stage": ("pipeoptim", 1, adamw, {"clip": 0.005}, None, ()),
    "global": ("pipeoptim", 4, adamw, {"clip": po.Clip(0.02, "global")}, None, ()),
    "global_m3": ("pipeoptim_stash", 3, adamw, {"clip": po.Clip(0.02, "global")}, None, ()),
    "global_2bw": ("pipedream_2bw", 4, adamw, {"clip": po.Clip(0.02, "global")}, None, ()),
    "global_flush": ("1f1b", 2, adamw, {"clip": po.Clip(0.02, "global")}, None, ()),
    "delayed": ("pipeoptim", 1, adamw, {"clip": po.Clip(0.02, "global_delayed")}, None, ()),
    "delayed_m": ("pipedream", 2, mixed, {"clip": po.Clip(0.02, "global_delayed")}, None, ()),
    "autocast": ("pipeoptim", 4, adamw, {"autocast": torch.bfloat16, "clip": po.Clip(0.02, "global")}, None, ()),
    "masters": ("pipeoptim", 2, adamw, {"clip": 0.005}, torch.bfloat16, ()),
    "scaler": ("pipeoptim", 1, adamw, {"scaler": scaler, "clip": 1.0}, torch.float16, (4, 13)),
    "scaler_global": ("pipeoptim", 4, mixed, {"scaler": scaler, "clip": po.Clip(0.5, "global")}, None, (18, 30)),
    "scaler_autocast": ("1f1b", 2, adamw, {"scaler": scaler, "autocast": torch.float16}, None, (7,)),
    "monitor": ("pipeoptim", 1, mixed, {"monitor": 2}, None, ()),
    "scale": ("pipeoptim", 1, mixed, {"scale": "auto", "monitor": 2}, None, ()),
    "scale_progress": ("pipeoptim_stash", 4, adamw, {"scale": "auto", "prediction": "in_progress"}, None, ()),
}


def stage(name, k):
    """Module, optimizer and scheduler of stage k of a case."""
    _, _, make, _, dtype, spikes = CASES[name]
    one = module(k, spikes)
    if dtype is None:
        optimizer = make(one.parameters(), k)
    else:
        one = one.to(dtype)
        optimizer = make(po.master_weights(one), k)
    return one, optimizer, warm_cosine(optimizer)


class Averages:
    """``on_update`` hook: an exponential average of the weights of each stage, made by torch's own class."""

    def __init__(self, modules):
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        self.modules = modules
        self.models = {k: torch.optim.swa_utils.AveragedModel(m, multi_avg_fn=average) for k, m in modules.items()}
        self.versions = []

    def __call__(self, k, version):
        self.versions.append((k, version))
        self.models[k].update_parameters(self.modules[k])


def train(name, pipe, averages):
    """MicroBatch a case to ``pipe``; what its local stages end with."""
    dtype = CASES[name][4] or torch.float32
    first, last = 0 in pipe.local_stages, DEPTH - 1 in pipe.local_stages
    losses, figures = [], {k: [] for k in pipe.local_stages}
    for n, (x, y) in enumerate(batches(dtype)):
        args, target = ([x] if first else []), y if last else None
        losses.append(pipe.step(*args, target=target))
        for k in pipe.local_stages:
            errors = [tuple(vars(e).values()) for e in pipe.prediction_error(k)]
            figures[k].append((pipe.version(k), pipe.grad_norm(k), errors))
        if n == DRAIN_AT:
            pipe.drain()
        if n == EVALUATE_AT:
            losses.append(pipe.eval_step(*args, target=target, drain=False))
    pipe.drain()
    return {
        k: {
            "state": pipe.stage_state_dict(k),
            "average": averages.models[k].state_dict(),
            "figures": figures[k],
            "losses": losses if k == DEPTH - 1 else [],
        }
        for k in pipe.local_stages
    }
