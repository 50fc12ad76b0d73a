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
    found = {"loss": evaluate(pipe), "gap": pipe.version_gap(p)}
    return {**found, "states": copied({k: pipe.stage_state_dict(k) for k in pipe.local_stages})}


def evaluate(pipe):
    """Drains first."""
    return pipe.evaluate([(x if p == 0 else (), x if p == processes - 1 else None) for x in islice(cases.batches(), 3)]).loss


def go_on(pipe, breaks):
    train(pipe, islice(cases.batches(), 4))  # and nothing is drained
    if breaks == "evaluation":
        evaluate(pipe)


for n, run in enumerate(cases.RUNS):
    module, pipe = make(run)
    boundary = until_the_boundary(pipe)
    found = {"never stopped": to_the_end(pipe)}
    for breaks, forward in cases.breaks(run).items():
        load(pipe, boundary)
        module.left = forward if p == 1 else -1
        try:
            go_on(pipe, breaks)
        except (OSError, po.StageFailure) as error:
            print(f"case {n} broken in {breaks}: {type(error).__name__}: {error}", flush=True)
        pipe.reconnect()
        load(pipe, boundary)
        found[breaks] = to_the_end(pipe)
    pipe.close()
    torch.save(found, f"{out}/{n}-{p}.pt")
dist.destroy_process_group()
