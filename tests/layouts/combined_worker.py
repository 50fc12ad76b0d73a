"""One of four processes: runs the cases of combined_cases, and resumes and exports sharded stages."""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.nn.parallel import DistributedDataParallel

import combined_cases as cases
import layout_cases
import pipeoptim as po

out = sys.argv[1]
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "pipe"))
single = init_device_mesh("cpu", (4, 1), mesh_dim_names=("data", "pipe"))
nested = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))


def wrapped(case, module, data):
    if case.wrap == "ddp":
        return DistributedDataParallel(module, process_group=data.get_group())
    for part in (module[0], module) if case.wrap in ("fsdp", "hsdp") else ():
        fully_shard(part, mesh=nested if case.wrap == "hsdp" else data)
    return module


def pipeline(case, mesh, **options):
    data, own = mesh["data"], mesh["pipe"].get_local_rank()
    stages, optimizers = [], []
    for k in range(own, case.depth, case.processes):
        module = wrapped(case, layout_cases.module(case, k), data)
        stages.append(PipelineStage(module, k, case.depth, torch.device("cpu"), group=mesh["pipe"].get_group()))
        optimizers.append(layout_cases.optimizer(case, module.parameters()))
    rates = [layout_cases.scheduler(optimizer) for optimizer in optimizers]
    options |= {"clip": case.clip, "timeout": 100, "overlap": case.overlap} | ({} if case.wrap else {"replicas": data})
    if case.chunks > 1:
        return po.InterleavedSchedule(
            stages, optimizers, nn.functional.mse_loss, case.method, case.m, schedulers=rates, **options
        )
    loss_fn = nn.functional.mse_loss
    return po.Schedule(stages[0], optimizers[0], loss_fn, case.method, case.m, scheduler=rates[0], **options)


def train(case, pipe, replica, begin=0, end=layout_cases.UPDATES):
    losses = []
    for x, y in list(layout_cases.batches())[begin:end]:
        x, y = cases.share(case, x, replica), cases.share(case, y, replica)
        losses.append(pipe.step(*([x] if 0 in pipe.local_stages else []), target=y))
    pipe.drain()
    return losses


def whole(value):
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def equal(case):
    mesh = single if case.depth == 1 else square
    replica = mesh["data"].get_local_rank()
    pipe = pipeline(case, mesh)
    losses = train(case, pipe, replica)
    states = {k: pipe.stage_state_dict(k)["module"] for k in pipe.local_stages}
    weights = {k: {name: whole(value) for name, value in state.items()} for k, state in states.items()}
    pipe.close()
    gaps = {k: [pipe.version_gap(k, i) for i in range(case.m)] for k in pipe.local_stages}
    return {"weights": weights, "losses": losses, "gaps": gaps, "replica": replica}


def resumed(case):
    """All mini-batches in one go; and five, a state that every process saves, and the others."""
    mesh, found = single if case.depth == 1 else square, []
    replica = mesh["data"].get_local_rank()
    for parts in ([(0, 5), (5, 9)], [(0, 5), None, (5, 9)]):
        pipe = pipeline(case, mesh)
        for part in parts:
            if part is None:
                for k in pipe.local_stages:
                    torch.save(pipe.stage_state_dict(k), f"{out}/state-{rank}-{k}.pt")
                pipe.close()
                pipe = pipeline(case, mesh)
                for k in pipe.local_stages:
                    pipe.load_stage_state_dict(k, torch.load(f"{out}/state-{rank}-{k}.pt", weights_only=False))
            else:
                train(case, pipe, replica, *part)
        found.append({k: {n: whole(v) for n, v in pipe.stage_module(k).state_dict().items()} for k in pipe.local_stages})
        pipe.close()
    return found


def exported(case):
    """What can be saved of sharded stages, and what cannot."""
    pipe, told = pipeline(case, square), []
    train(case, pipe, square["data"].get_local_rank())
    full = po.full_state_dict(pipe)
    for save in (po.save_weights, po.save_sharded, po.load_sharded):
        try:
            save(pipe, f"{out}/exported")
        except po.ConfigError as error:
            told.append(str(error))
    pipe.close()
    return {"full": full, "told": told}


for n, case in enumerate(cases.CASES):
    torch.save(equal(case), f"{out}/{n}-{rank}.pt")
for n in (4, 6):
    torch.save(resumed(cases.CASES[n]), f"{out}/resumed-{n}-{rank}.pt")
torch.save(exported(cases.CASES[4]), f"{out}/exported-{rank}.pt")
dist.destroy_process_group()
