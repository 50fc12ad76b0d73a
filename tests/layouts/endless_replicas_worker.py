"""One process of 2 stages x 2 replicas that trains until it is killed."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage

import pipeoptim as po

torch.set_num_threads(1)
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "pipe"))
k = mesh["pipe"].get_local_rank()
module = nn.Linear(4, 4)
stage = PipelineStage(module, k, 2, torch.device("cpu"), group=mesh["pipe"].get_group())
optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
pipe = po.Schedule(stage, optimizer, nn.functional.mse_loss, replicas=mesh["data"], liveness_timeout=5)
for n in range(10**9):
    pipe.step(*([torch.ones(2, 4)] if k == 0 else []), target=torch.ones(2, 4) if k == 1 else None)
    if n == 5:
        print("running", flush=True)
