"""One stage of a pipeline on slow links that chooses its slack; writes what it chose and its weights, before and after a resume."""

import copy
import os
import sys
import time

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage

import pipeoptim as po
from pipeoptim.bench import slow

out, seconds = sys.argv[1], float(sys.argv[2])
torch.set_num_threads(1)
k, depth = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
slow.register()
dist.init_process_group("slow")


class Slow(torch.nn.Linear):
    def forward(self, x):
        time.sleep(seconds)
        return super().forward(x)


def schedule():
    torch.manual_seed(k)
    module = Slow(4, 4)
    stage = PipelineStage(module, k, depth, torch.device("cpu"))
    opt = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    return po.Schedule(stage, opt, torch.nn.functional.mse_loss, slack="auto", seed=0, timeout=60)


def feed(pipe, first, end):
    for n in range(first, end):
        x = torch.full((2, 4), 1.0 / (n + 1))
        pipe.step(*((x,) if k == 0 else ()), target=x if k == depth - 1 else None)


pipe = schedule()
feed(pipe, 0, 20)
assert pipe.slack == 0.0
pipe.drain()
early = pipe.stage_state_dict(k)
assert "slack" not in early
feed(pipe, 20, 44)
chosen, at = pipe.slack, pipe.version(k)
pipe.drain()
state = copy.deepcopy(pipe.stage_state_dict(k))
feed(pipe, 44, 50)
pipe.drain()
weights = [p.detach().clone() for p in pipe.stage_module(k).parameters()]

again = schedule()
again.load_stage_state_dict(k, state)
assert again.slack == chosen
feed(again, 44, 50)
again.drain()
for sender in again._connections.senders:
    sender.flush()  # the slow group holds messages back
for a, b in zip(weights, again.stage_module(k).parameters(), strict=True):
    assert torch.equal(a, b)
torch.save({"slack": list(chosen) if isinstance(chosen, tuple) else chosen, "weights": weights}, f"{out}/{k}.pt")
dist.barrier()
os._exit(0)  # the slow group of the benchmarks cannot be given back
