"""One of two stages that choose their slack, and whose M changes before they have measured enough; writes what and when they chose."""

import json
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage

import auto_slack_changes as case
import pipeoptim as po

torch.set_num_threads(1)
k = int(os.environ["RANK"])
dist.init_process_group("gloo")
module = case.stages()[k]
stage = PipelineStage(module, k, 2, torch.device("cpu"))
pipe = po.Schedule(stage, case.adamw(module.parameters()), torch.nn.functional.mse_loss, slack="auto", timeout=60)
chosen_at = None
for n, x in enumerate(case.batches()):
    if n == case.CHANGE:
        pipe.set_microbatches(2)
    pending = pipe._measured_at >= 0
    pipe.step(*((x,) if k == 0 else ()), target=x if k == 1 else None)
    if pending and pipe._measured_at < 0:
        chosen_at = n
pipe.drain()
torch.save([p.detach() for p in module.parameters()], f"{sys.argv[1]}/{k}.pt")
with open(f"{sys.argv[1]}/{k}.json", "w") as file:
    json.dump([chosen_at, pipe.slack], file)
pipe.close()
