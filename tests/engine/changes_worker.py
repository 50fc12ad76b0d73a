"""One stage of a run whose number of micro-batches changes, between steps and from on_update; then one that only some stages are told."""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage

import case
import pipeoptim as po
from test_microbatch_changes import CHANGES, asking, batch

out = sys.argv[1]
torch.set_num_threads(1)
k, depth = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo")


def schedule(on_update=None, **options):
    module = case.pieces(depth)[k]
    opt = case.optimizer("adamw", module.parameters())
    stage = PipelineStage(module, k, depth, torch.device("cpu"))
    options |= {"scheduler": case.scheduler(opt), "on_update": on_update, "timeout": 60, "seed": 3}
    return po.Schedule(stage, opt, case.loss_fn, "pipeoptim", 1, **options)


def feed(pipe, n, x, y):
    return pipe.step(*([x] if k == 0 else []), target=y if k == depth - 1 else None)


for asked in ("between", "within"):
    holder = []
    pipe = schedule(asking(holder) if asked == "within" else None, transport="group" if asked == "within" else "auto", slack=1)
    holder.append(pipe)
    for n, whole in enumerate(case.batches()):
        if asked == "between" and n in CHANGES:
            pipe.set_microbatches(CHANGES[n])
        feed(pipe, n, *batch(n, *whole))
    pipe.drain()
    torch.save(pipe.stage_state_dict(k), f"{out}/{asked}-{k}.pt")
    pipe.close()

for told in (0, 1):  # the stages whose script asks for another number, or for one at all
    pipe = schedule(liveness_timeout=None)
    batches = [batch(n, *whole) for n, whole in enumerate(case.batches())]
    try:
        for n in range(6):
            if n == 3 and (k == 0) == (told == 0):
                pipe.set_microbatches(2)
            elif n == 3 and told == 0:
                pipe.set_microbatches(4)
            feed(pipe, n, *batches[n])
    except po.PipeOptimError as error:
        print(told, error)
    pipe.close()
    dist.barrier()
dist.destroy_process_group()
