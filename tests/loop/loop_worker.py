"""One stage of every case; writes what it ends with."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage

import loop_cases as cases
import pipeoptim as po

THROUGH_GROUP = ("delayed_m", "global_m3")
out = sys.argv[1]
torch.set_num_threads(1)
k, depth = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo")
for name, (method, m, _, options, _, _) in cases.CASES.items():
    module, optimizer, scheduler = cases.stage(name, k)
    averages = cases.Averages({k: module})
    own = {**options, "scaler": options["scaler"]()} if "scaler" in options else options
    pipe = po.Schedule(
        PipelineStage(module, k, depth, torch.device("cpu")),
        optimizer,
        cases.loss_fn,
        method,
        m,
        scheduler=scheduler,
        seed=3,
        on_update=averages,
        timeout=60,
        transport="group" if name in THROUGH_GROUP else "auto",
        **own,
    )
    shares = isinstance(options.get("clip"), po.Clip) and options["clip"].exchanges and name not in THROUGH_GROUP
    assert ("pipeoptim-norms" in Path("/proc/self/maps").read_text()) == shares
    result = cases.train(name, pipe, averages)[k]
    pipe.close()
    torch.save(result, f"{out}/{name}-{k}.pt")
dist.destroy_process_group()
