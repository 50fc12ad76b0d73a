"""One of two replicas of a pipeline of one stage, of which each is given its own number of mini-batches; prints what it is told."""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage

import pipeoptim as po

torch.set_num_threads(1)
rank = int(os.environ["RANK"])
dist.init_process_group("gloo")
alone = [dist.new_group([n]) for n in range(2)]
module, x = torch.nn.Linear(4, 4), torch.ones(4, 4)
stage = PipelineStage(module, 0, 1, torch.device("cpu"), group=alone[rank])
optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
pipe = po.Schedule(stage, optimizer, torch.nn.functional.mse_loss, timeout=60, replicas=dist.group.WORLD)
try:
    for _ in range(7 if rank == 0 else 4):
        pipe.step(x, target=x)
    pipe.drain()
except po.PipeOptimError as error:
    print(error)
pipe.close()
dist.barrier()
sys.stdout.flush()
