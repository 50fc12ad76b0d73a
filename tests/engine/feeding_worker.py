"""One of two processes with one stage and with two, which are fed: lists, arrays and dicts, evaluations, and other numbers than the other.

Writes states and losses, and what it was told, to the folder in its argument.
"""

import json
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage

import evaluation_cases
import pipeoptim as po
import split_cases

out = sys.argv[1]
torch.set_num_threads(1)
p = int(os.environ["RANK"])
dist.init_process_group("gloo")


def made(cases, depth):
    own = {k: stage for k, stage in enumerate(cases.stages(depth)) if k % 2 == p}
    stages = [PipelineStage(module, k, depth, torch.device("cpu")) for k, module in own.items()]
    return stages, [cases.sgd(module.parameters()) for module in own.values()]


def plain(cases, m=1, timeout=60, **options):
    (stage,), (optimizer,) = made(cases, 2)
    return po.Schedule(stage, optimizer, cases.loss_fn, "pipeoptim", m, timeout=timeout, **options)


def interleaved(cases, m=1, **options):
    return po.InterleavedSchedule(*made(cases, 4), cases.loss_fn, "pipeoptim", m, timeout=60, **options)


# -- splitting ---------------------------------------------------------------------------------------------------------

for make in (plain, interleaved):
    pipe, losses = make(split_cases, 2, uneven=True), []
    for x, gate, y in split_cases.batches():
        inputs, target = ([x], None) if p == 0 else ([], y)
        losses.append(pipe.step(*inputs, target=target, stage_kwargs={1: {"gate": gate}}))
    pipe.drain()
    states = {k: pipe.stage_state_dict(k) for k in pipe.local_stages}
    torch.save({"states": states, "losses": losses if p == 1 else []}, f"{out}/{make.__name__}-{p}.pt")
    pipe.close()

# Only the activations tell the last stage how many rows there are.
rows, refusals = split_cases.numbers(4, 0), []
for wrong in ({"gate": split_cases.numbers(6, 0)}, {"target": split_cases.numbers(6, 0)}):
    pipe = plain(split_cases, 2)
    try:
        pipe.step(*([rows] if p == 0 else []), **(wrong if p == 1 else {}))
    except po.PipeOptimError as error:
        refusals.append(str(error))
    pipe.close()  # which ends the wait of the other stage
    dist.barrier()

# -- evaluation --------------------------------------------------------------------------------------------------------

found = [
    list(evaluation_cases.evaluations(lambda options, make=make: make(evaluation_cases, **options)))
    for make in (plain, interleaved)
]


def drain(pipe):
    pipe.drain()


def evaluate(pipe):
    pipe.evaluate(evaluation_cases.batches([2, 2]))


def evaluate_less(pipe):
    pipe.drain()
    pipe.evaluate(evaluation_cases.batches([2] * (3 - p)))


def nothing(pipe):
    pipe.evaluate([])


told = []
for short, then in ((0, drain), (1, drain), (0, evaluate), (1, evaluate), (None, evaluate_less), (None, nothing)):
    pipe = plain(evaluation_cases, timeout=3)
    said = "nothing"
    try:
        evaluation_cases.train(pipe, 4 if p == short else 7)
        then(pipe)
    except po.PipeOptimError as error:
        said = str(error)
    pipe.close()
    told.append(f"{short} {then.__name__}: {said}")
    dist.barrier()

# -- evaluations that end otherwise on one process: told at once, long before the time-out --------------------------------


def more_on(longer):
    return lambda: evaluation_cases.batches([2] * (3 if p == longer else 2))


def raising_on(failing):
    def batches():
        yield from evaluation_cases.batches([2, 2])
        if p == failing:
            raise KeyError("no such file")
        yield from evaluation_cases.batches([2])

    return batches


at_once = []
for batches in (more_on(0), more_on(1), raising_on(0), raising_on(1)):
    pipe = plain(evaluation_cases, timeout=600)
    evaluation_cases.train(pipe, 3)
    try:
        pipe.evaluate(batches())
        said = "nothing"
    except (po.PipeOptimError, KeyError) as error:
        said = f"{type(error).__name__}: {error}"
    dist.barrier()  # before close(), which would end a wait of the other
    pipe.close()
    at_once.append(said)

with open(f"{out}/{p}.json", "w") as file:
    json.dump({"refusals": refusals, "found": found, "told": told, "at_once": at_once}, file)
