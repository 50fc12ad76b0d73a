"""One stage of a run that goes on until somebody is killed."""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage

import pipeoptim as po

torch.set_num_threads(1)
k, depth = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo")
module = torch.nn.Linear(8, 8)
stage = PipelineStage(module, k, depth, torch.device("cpu"))
pipe = po.Schedule(
    stage,
    torch.optim.SGD(module.parameters(), lr=1e-3),
    torch.nn.functional.mse_loss,
    timeout=600,
    liveness_timeout=float(sys.argv[1]),
    transport=sys.argv[2],
)
x = torch.ones(4, 8)
for n in range(10**9):
    pipe.step(*([x] if k == 0 else []), target=x if k == depth - 1 else None)
    if n == 20:
        print("running", flush=True)
