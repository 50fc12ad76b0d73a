"""One process of the runs that test_partition_processes compares with the emulator: pipelines of 2, 3 and 4 of these processes."""

import json
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage

import partition_models as models
import pipeoptim as po

out, runs = sys.argv[1], json.loads(sys.argv[2])  # depth -> models
torch.set_num_threads(1)
k = int(os.environ["RANK"])
for depth in sorted(d for d in map(int, runs) if d > k):
    meet = f"file://{out}/meet-{depth}"
    dist.init_process_group("gloo", init_method=meet, rank=k, world_size=depth, timeout=timedelta(seconds=120))
    for name in runs[str(depth)]:
        case = models.case(name)
        cut = po.partition(case.model, depth, case.args, case.kwargs, costs=models.equal_costs(name))
        stage = cut.stages[k]
        case = case._replace(model=None)
        torch.manual_seed(3)
        place = PipelineStage(stage, k, depth, torch.device("cpu"))
        pipe = po.Schedule(place, models.optimizer(stage.parameters()), case.loss, timeout=60)
        losses = []
        for args, kwargs, target in models.feeds(case):
            first = (args, kwargs) if k == 0 else ([], {})
            losses.append(pipe.step(*first[0], target=target if k == depth - 1 else None, **first[1]))
        pipe.drain()
        pipe.close()
        torch.save({"state": stage.state_dict(), "losses": losses}, f"{out}/{name}-{depth}-{k}.pt")
    dist.destroy_process_group()
