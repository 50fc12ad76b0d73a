"""One of three processes that give up what is in flight, connect anew, load what was saved before, and go on; writes where that ends."""

import os
import sys
from itertools import islice

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.utils._pytree import tree_map_only

import case
import pipeoptim as po
import reconnect_cases as cases

out = sys.argv[1]
torch.set_num_threads(1)
p, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo")


class Breaks(nn.Module):
    """Fails at one forward, and works again after it."""

    def __init__(self, stage):
        super().__init__()
        self.stage, self.left = stage, -1

    def forward(self, x):
        self.left -= 1
        if self.left == 0:
            raise OSError("a disk was full")
        return self.stage(x)


def make(run):
    torch.manual_seed(7)
    depth = processes * run.chunks
    modules = {k: Breaks(cases.stage()) for k in range(p, depth, processes)}
    optimizers = [case.optimizer(run.optimizer, module.parameters()) for module in modules.values()]
    stages = [PipelineStage(module, k, depth, torch.device("cpu")) for k, module in modules.items()]
    given = run.method, run.m
    options = {"clip": run.clip, "transport": run.transport, "tied": run.tied, "seed": 3, "timeout": 60}
    if run.chunks > 1:
        return modules[p], po.InterleavedSchedule(stages, optimizers, nn.functional.mse_loss, *given, **options)
    return modules[p], po.Schedule(stages[0], optimizers[0], nn.functional.mse_loss, *given, **options)


def train(pipe, batches):
    for x in batches:
        pipe.step(*([x] if p == 0 else []), target=x if p == processes - 1 else None)


def copied(state):
    """Optimizers go on working in the tensors that they are given."""
    return tree_map_only(torch.Tensor, torch.clone, state)


def load(pipe, states):
    for k, state in states.items():
        pipe.load_stage_state_dict(k, copied(state))


def until_the_boundary(pipe):
    train(pipe, islice(cases.batches(), cases.SAVED))
    pipe.drain()
    return copied({k: pipe.stage_state_dict(k) for k in pipe.local_stages})


def to_the_end(pipe):
    train(pipe, islice(cases.batches(), cases.SAVED, None))
    pipe.drain()
    return copied({k: pipe.stage_state_dict(k) for k in pipe.local_stages})


for n, run in enumerate(cases.RUNS):
    module, pipe = make(run)
    boundary = until_the_boundary(pipe)
    found = {"never stopped": to_the_end(pipe)}
    for breaks in (0, 3):
        load(pipe, boundary)
        module.left = breaks if p == 1 else -1
        try:
            train(pipe, islice(cases.batches(), 5))  # nothing is drained, and process 1 may break
        except (OSError, po.StageFailure) as error:
            print(f"case {n} broken by {breaks}: {type(error).__name__}: {error}", flush=True)
        pipe.reconnect()
        load(pipe, boundary)
        found[f"broken by {breaks}"] = to_the_end(pipe)
    pipe.close()
    torch.save(found, f"{out}/{n}-{p}.pt")
dist.destroy_process_group()
