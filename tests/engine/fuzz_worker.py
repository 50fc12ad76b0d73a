"""One process of the fuzz: takes its part in every random pipeline, and writes the fingerprint of every stage it was."""

import faulthandler
import json
import os
import sys
import warnings
from collections import Counter

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage

import fuzz_cases
import pipeoptim as po
from pipeoptim.engine import groups as made_by_engine
from pipeoptim.engine import link

out, count, limit = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
faulthandler.dump_traceback_later(limit, exit=True)  # the watchdog: a hang ends with the place where it hangs
warnings.simplefilter("ignore")
torch.set_num_threads(1)
rank = int(os.environ["RANK"])
dist.init_process_group("gloo")
cuts = ((0, 1, 2, 3), (0, 1), (2, 3), (0,), (1, 2, 3), (0, 1, 2), (3,))
groups = {ranks: [dist.new_group(list(ranks)) for _ in range(2)] for ranks in cuts}
asked = Counter()


def reuse(ranks, *_):
    """Instead of a group of its own: connecting anew for every pipeline would take longer than running it."""
    asked[tuple(ranks)] += 1
    return groups[tuple(ranks)][asked[tuple(ranks)] % 2]


def hand_back(pipe):
    """Match the receives that are posted ahead, so that the next pipeline finds its groups empty."""
    for sender in (pipe._to_next, pipe._to_previous):
        if sender is not None:
            sender._start(link._Block(sender._memory(sender.size), []))
    for receiver in (pipe._from_previous, pipe._from_next):
        if receiver is not None:
            receiver.post()
            receiver.wait(receiver._posted[0])


made_by_engine.new_group, made_by_engine.destroy = reuse, lambda group: None
digests = {}
for row in fuzz_cases.rounds(count):
    first, case = next((first, case) for first, case in row if first <= rank < first + case.depth)
    k, ranks = rank - first, tuple(range(first, first + case.depth))
    print(f"case {case.seed}, stage {k}", flush=True)
    module = case.module(k)
    stage = PipelineStage(module, k, case.depth, torch.device("cpu"), group=groups[ranks][0])
    options = {"timeout": 60, "liveness_timeout": None, **case.options()}
    pipe = po.Schedule(stage, case.make_optimizer(module), fuzz_cases.loss_fn, **options)
    digests.update({f"{case.seed}/{k}": d for k, d in case.train(pipe).items()})
    hand_back(pipe)
    pipe.close()
with open(f"{out}/{rank}.json", "w") as file:
    json.dump(digests, file)
dist.barrier()
dist.destroy_process_group()
