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
from pipeoptim.engine.processes import rendezvous as made_by_engine
from pipeoptim.engine.transport import link

out, count, limit = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
faulthandler.dump_traceback_later(limit, exit=True)  # the watchdog: a hang ends with the place where it hangs
warnings.simplefilter("ignore")
torch.set_num_threads(1)
rank = int(os.environ["RANK"])
dist.init_process_group("gloo")
asked, made, connect = Counter(), {}, made_by_engine.new_group


def reuse(ranks, name, *rest):
    """Instead of a group of its own: connecting anew for every pipeline would take longer than running it."""
    use = tuple(ranks), name.rpartition("-")[2]
    asked[use] += 1
    key = *use, asked[use] % 2
    if key not in made:
        made[key] = connect(ranks, name, *rest)
    return made[key]


def hand_back(pipe):
    """Match the receives that are posted ahead, so that the next pipeline finds its groups empty; channels are a pipeline's own."""
    for sender in (end for end in pipe._connections.senders if end.channel is None):
        for _ in range(sender.window):
            sender._start_send(link.MessageBuffer(sender._memory(sender.size), []), [])
    for receiver in (end for end in pipe._connections.receivers if end.channel is None):
        receiver.post_receive()
        for work, _ in receiver._posted:
            receiver.wait(work)


def pipeline(case, ranks, loss_fn, **options):
    """The stages of this process, and what drives them."""
    place = ranks.index(rank)
    modules = {k: case.module(k) for k in range(place, case.depth, len(ranks))}
    optimizers = [case.make_optimizer(module) for module in modules.values()]
    stages = [PipelineStage(module, k, case.depth, torch.device("cpu"), group=groups[ranks]) for k, module in modules.items()]
    options |= {"timeout": 60, "liveness_timeout": None, **case.options()}
    options |= {"transport": ("auto", "group")[case.seed % 2]}
    if len(stages) > 1:
        return po.InterleavedSchedule(stages, optimizers, loss_fn, **options)
    return po.Schedule(stages[0], optimizers[0], loss_fn, **options)


def train(case, ranks):
    pipe = pipeline(case, ranks, fuzz_cases.loss_fn)
    found = case.train(pipe)
    hand_back(pipe)
    pipe.close()
    return found


def train_replica(case):
    """The first replica's loss counts twice, the second one's not at all."""
    replica, k = divmod(rank, 2)
    factor = 0.0 if replica else 2.0
    pipe = pipeline(
        case, (2 * replica, 2 * replica + 1), lambda *given: factor * fuzz_cases.loss_fn(*given), replicas=groups[k, k + 2]
    )
    pipe.stage_module(k).factor = factor
    found = case.train(pipe, factor)
    hand_back(pipe)
    pipe.close()
    return {} if replica else found


groups = {
    ranks: dist.new_group(list(ranks))
    for ranks in ((0, 1, 2, 3), (0, 1), (2, 3), (0,), (1, 2, 3), (0, 1, 2), (3,), (0, 2), (1, 3))
}
made_by_engine.new_group, made_by_engine.destroy = reuse, lambda group: None
digests = {}
for row in fuzz_cases.rounds(count):
    ranks, case = next((ranks, case) for ranks, case in row if rank in ranks)
    print(f"case {case.seed} {case.layout}", flush=True)
    found = train_replica(case) if case.layout == "replicas" else train(case, ranks)
    digests.update({f"{case.seed}/{k}": d for k, d in found.items()})
with open(f"{out}/{rank}.json", "w") as file:
    json.dump(digests, file)
dist.barrier()
dist.destroy_process_group()
