"""One process of 2 stages x 2 replicas: runs the cases of layout_cases and writes what this process ends with."""

import os
import sys
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage
from torch.nn.parallel import DistributedDataParallel

import layout_cases as cases
import pipeoptim as po
from pipeoptim.engine import reduction

out, which = sys.argv[1], sys.argv[2]
torch.set_num_threads(1)
reduction.BUCKET_BYTES = 300  # several buckets for these small layers
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (cases.REPLICAS, cases.DEPTH), mesh_dim_names=("data", "pipe"))
k, replica = mesh["pipe"].get_local_rank(), mesh["data"].get_local_rank()
first, last = k == 0, k == cases.DEPTH - 1


def schedule(module, opt, m=1, method="pipeoptim", **options):
    stage = PipelineStage(module, k, cases.DEPTH, torch.device("cpu"), group=mesh["pipe"].get_group())
    return po.Schedule(stage, opt, nn.functional.mse_loss, method, m, seed=3, timeout=60, **options)


def feed(pipe, x, y, m=1):
    x, y = cases.share(x, m, replica), cases.share(y, m, replica)
    return pipe.step(*([x] if first else []), target=y if last else None)


def equal_case(case):
    module = cases.module(case, k)
    options = {"replicas": mesh["data"]}
    if case.wrap == "ddp":
        module = DistributedDataParallel(module, process_group=mesh["data"].get_group(), find_unused_parameters=case.odd)
        options = {}
    elif replica == 1:
        with torch.no_grad():
            for p in module.parameters():
                p.add_(1.0)  # the first replica's weights are those that count
    if case.overlap:
        options["overlap"] = True
    opt = cases.optimizer(case, module.parameters())
    pipe = schedule(module, opt, case.m, case.method, scheduler=cases.scheduler(opt), clip=case.clip, **options)
    losses = []
    for n, (x, y) in enumerate(cases.batches()):
        losses.append(feed(pipe, x, y, case.m))
        if n == 5:
            pipe.drain()
    pipe.drain()
    pipe.close()
    state = pipe.stage_state_dict(k)
    assert pipe.version(k) == cases.UPDATES
    return {"module": state["module"], "losses": losses, "gaps": [pipe.version_gap(k, i) for i in range(case.m)]}


todo = {"plain": cases.plain(), "ddp": [replace(c, wrap="ddp") for c in cases.plain()]}
for name in which.split(","):
    for case in todo[name]:
        torch.save(equal_case(case), f"{out}/{case.name()}-{k}-{replica}.pt")
dist.destroy_process_group()
