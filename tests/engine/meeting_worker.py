"""One of two stages, of which stage 1 stops itself just before all meet in a collective that is none of the pipeline's links."""

import os
import signal
import sys

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage

import pipeoptim as po
from pipeoptim.engine.processes.collectives import all_gather_plain
from pipeoptim.engine.processes.opened_sockets import OpenedSockets

torch.set_num_threads(1)
k = int(os.environ["RANK"])
sockets = OpenedSockets()
with sockets:
    dist.init_process_group("gloo")
module = torch.nn.Linear(8, 8)
stage = PipelineStage(module, k, 2, torch.device("cpu"))
pipe = po.Schedule(
    stage, torch.optim.SGD(module.parameters(), lr=1e-3), torch.nn.functional.mse_loss, timeout=600, liveness_timeout=2.0
)
x = torch.ones(4, 8)
for _ in range(4):
    pipe.step(*([x] if k == 0 else []), target=x if k == 1 else None)
pipe.drain()
po.full_state_dict(pipe)  # makes the group in which processes save
with pipe.meeting(sockets):
    assert all_gather_plain(k) == [0, 1]
print("ready", flush=True)
if k == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
if sys.argv[1] == "saving":
    po.full_state_dict(pipe)
else:
    with pipe.meeting(sockets):
        all_gather_plain(k)
