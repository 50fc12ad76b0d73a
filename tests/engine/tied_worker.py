"""One stage of every case of tied_cases, then the mistakes that users make; writes what it ends with."""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage

import pipeoptim as po
import tied_cases as cases

out = sys.argv[1]
torch.set_num_threads(1)
k, depth = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo")


def schedule(case, module, optimizer, **options):
    stage = PipelineStage(module, k, depth, torch.device("cpu"))
    return po.Schedule(stage, optimizer, cases.loss_fn, case.method, case.m, timeout=60, **options)


for name, case in cases.CASES.items():
    module, optimizer, scheduler = cases.stage(case, k)
    pipe = schedule(case, module, optimizer, scheduler=scheduler, **cases.options(case))
    result = cases.train(pipe)[k]
    pipe.close()
    torch.save(result, f"{out}/{name}-{k}.pt")

told, case = {}, cases.Case(tied=cases.MIDDLE)
for mistake in ("other tied", "other rate"):
    module, optimizer, _ = cases.stage(case, k)
    tied = cases.ENDS if mistake == "other tied" and k == 2 else cases.MIDDLE
    if mistake == "other rate" and k == 1:
        optimizer.param_groups[0]["lr"] = 0.5
    try:
        schedule(case, module, optimizer, tied=tied, liveness_timeout=None)
    except po.ConfigError as error:
        told[mistake] = str(error)
    dist.barrier()
torch.save(told, f"{out}/told-{k}.pt")
dist.destroy_process_group()
