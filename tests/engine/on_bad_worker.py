"""One of two processes that run every case of on_bad_cases, and then one that stops."""

import sys

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage

import case
import on_bad_cases as cases
import pipeoptim as po

out = sys.argv[1]
torch.set_num_threads(1)
dist.init_process_group("gloo")
p = dist.get_rank()


def feed(x, y):
    return ([x] if p == 0 else []), (y if p == 1 else None)


def schedule(name, depth, method, m, options):
    (modules, loss_fn), ks = cases.pieces(name), range(p, depth, 2)
    stages = [PipelineStage(modules[k], k, depth, torch.device("cpu")) for k in ks]
    opts = [case.optimizer("adamw", modules[k].parameters()) for k in ks]
    rates = [case.scheduler(opt) for opt in opts]
    if len(stages) == 1:
        return po.Schedule(stages[0], opts[0], loss_fn, method, m, scheduler=rates[0], seed=3, timeout=60, **options)
    return po.InterleavedSchedule(stages, opts, loss_fn, method, m, schedulers=rates, seed=3, timeout=60, **options)


for name, (depth, method, m, options) in cases.CASES.items():
    own = {**options, "scaler": options["scaler"]()} if "scaler" in options else options
    pipe = schedule(name, depth, method, m, {**own, "on_bad": "skip"})
    losses = cases.train(pipe, feed, m, name)
    pipe.close()
    for k in pipe.local_stages:
        torch.save({"state": pipe.stage_state_dict(k), "losses": losses}, f"{out}/{name}-{k}.pt")

pipe = schedule("pipeoptim", 2, "pipeoptim", 1, {})
try:
    cases.train(pipe, feed, 1)
except po.PipeOptimError as error:
    print(f"{type(error).__name__}: {error}; version {pipe.version(p)}")
