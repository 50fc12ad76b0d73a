"""One of two processes that split lists, arrays and dicts, with one stage each and with two; writes its states and losses."""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage

import pipeoptim as po
import split_cases as cases

out = sys.argv[1]
torch.set_num_threads(1)
p = int(os.environ["RANK"])
dist.init_process_group("gloo")


def made(depth):
    own = {k: stage for k, stage in enumerate(cases.stages(depth)) if k % 2 == p}
    stages = [PipelineStage(module, k, depth, torch.device("cpu")) for k, module in own.items()]
    return stages, [cases.sgd(module.parameters()) for module in own.values()]


def plain(m=2, uneven=True):
    (stage,), (optimizer,) = made(2)
    return po.Schedule(stage, optimizer, cases.loss_fn, "pipeoptim", m, uneven=uneven, timeout=60)


def interleaved():
    return po.InterleavedSchedule(*made(4), cases.loss_fn, "pipeoptim", 2, uneven=True, timeout=60)


for name, make in (("plain", plain), ("interleaved", interleaved)):
    pipe, losses = make(), []
    for x, gate, y in cases.batches():
        inputs, target = ([x], None) if p == 0 else ([], y)
        losses.append(pipe.step(*inputs, target=target, stage_kwargs={1: {"gate": gate}}))
    pipe.drain()
    states = {k: pipe.stage_state_dict(k) for k in pipe.local_stages}
    torch.save({"states": states, "losses": losses if p == 1 else []}, f"{out}/{name}-{p}.pt")
    pipe.close()

# Only the activations tell the last stage how many rows there are.
rows = cases.numbers(4, 0)
for wrong in ({"gate": cases.numbers(6, 0)}, {"target": cases.numbers(6, 0)}):
    pipe = plain(uneven=False)
    try:
        pipe.step(*([rows] if p == 0 else []), **(wrong if p == 1 else {}))
    except po.PipeOptimError as error:
        print(error)
    pipe.close()  # which ends the wait of the other stage
    dist.barrier()
sys.stdout.flush()
os._exit(0)  # gloo may abort at exit after connections that were given up
