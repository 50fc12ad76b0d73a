"""One of two processes with one stage and with two: evaluates, and is fed other numbers of batches than the other process."""

import json
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage

import evaluation_cases as cases
import pipeoptim as po

torch.set_num_threads(1)
p = int(os.environ["RANK"])
dist.init_process_group("gloo")


def made(depth):
    own = {k: stage for k, stage in enumerate(cases.stages(depth)) if k % 2 == p}
    stages = [PipelineStage(module, k, depth, torch.device("cpu")) for k, module in own.items()]
    return stages, [cases.sgd(module.parameters()) for module in own.values()]


def plain(options, timeout=60):
    (stage,), (optimizer,) = made(2)
    return po.Schedule(stage, optimizer, cases.loss_fn, "pipeoptim", timeout=timeout, **options)


def interleaved(options):
    return po.InterleavedSchedule(*made(4), cases.loss_fn, "pipeoptim", timeout=60, **options)


for make in (plain, interleaved):
    print(json.dumps(list(cases.evaluations(make))))


def drain(pipe):
    pipe.drain()


def evaluate(pipe):
    pipe.evaluate(cases.batches([2, 2]))


def evaluate_less(pipe):
    pipe.drain()
    pipe.evaluate(cases.batches([2] * (3 - p)))


def nothing(pipe):
    pipe.evaluate([])


for short, then in ((0, drain), (1, drain), (0, evaluate), (1, evaluate), (None, evaluate_less), (None, nothing)):
    pipe = plain({}, timeout=3)
    told = "nothing"
    try:
        cases.train(pipe, 4 if p == short else 7)
        then(pipe)
    except po.PipeOptimError as error:
        told = str(error)
    pipe.close()
    print(f"{short} {then.__name__}: {told}")
    dist.barrier()
sys.stdout.flush()
os._exit(0)  # gloo may abort at exit after connections that were given up
