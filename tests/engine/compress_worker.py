"""One of two processes that run every case of compress_cases, and then try what must be refused."""

import sys

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage

import case
import compress_cases as cases
import pipeoptim as po

out = sys.argv[1]
torch.set_num_threads(1)
dist.init_process_group("gloo")
p = dist.get_rank()


def feed(x, y):
    return ([x] if p == 0 else []), (y if p == 1 else None)


def schedule(modules, m, options):
    ks = range(p, len(modules), 2)
    stages = [PipelineStage(modules[k], k, len(modules), torch.device("cpu")) for k in ks]
    opts = [cases.optimizer(modules[k]) for k in ks]
    if len(stages) == 1:
        return po.Schedule(stages[0], opts[0], case.loss_fn, "pipeoptim", m, seed=3, timeout=60, **options)
    return po.InterleavedSchedule(stages, opts, case.loss_fn, "pipeoptim", m, seed=3, timeout=60, **options)


def refused(modules, options):
    try:
        schedule(modules, 1, options)
    except po.ConfigError as error:
        print(error)
    dist.barrier()


for name, (modules, batches, m, options) in cases.CASES.items():
    own = {**options, "scaler": options["scaler"]()} if "scaler" in options else options
    pipe = schedule(modules(), m, own)
    losses = cases.train(pipe, feed, batches())
    pipe.close()
    for k in pipe.local_stages:
        torch.save({"state": pipe.stage_state_dict(k), "losses": losses}, f"{out}/{name}-{k}.pt")

sizes = []
for kind in (None, "bf16", "int8"):
    torch.manual_seed(0)
    modules = [torch.nn.Linear(4, 512), torch.nn.Linear(512, 4)]
    x = torch.randn(32, 4)
    pipe = schedule(modules, 1, {"compress": kind})
    for _ in range(4):
        args, _ = feed(x, x)
        pipe.step(*args, target=torch.zeros(32, 4) if p else None)
    pipe.drain()
    sizes.append(pipe._connections.senders[0].size)
    pipe.close()
print("bytes", *sizes)
refused(case.pieces(2), {"compress": "int8" if p else None})
refused(case.pieces(2), {"compress": po.Compression("int8", "int8", "gradients" if p else "none")})
refused(case.pieces(4), {"compress": "int8" if p else "bf16"})
dist.destroy_process_group()
