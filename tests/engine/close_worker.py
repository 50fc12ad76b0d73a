"""One of three processes that make pipelines and close them, in every state that a pipeline can be in; prints what it saw."""

import os
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage

import pipeoptim as po

torch.set_num_threads(1)
k = int(os.environ["RANK"])
dist.init_process_group("gloo")
pair = dist.new_group([0, 1])
x = torch.ones(4, 4)


def pipeline(members=(0, 1, 2), group=None, own=None, **options):
    """A stage in every process of ``members``."""
    module, depth = own or nn.Linear(4, 4), len(members)
    stage = PipelineStage(module, members.index(k), depth, torch.device("cpu"), group=group)
    optimizer = torch.optim.SGD(nn.Linear(4, 4).parameters() if options.pop("wrong", False) else module.parameters(), lr=0.1)
    return po.Schedule(stage, optimizer, nn.functional.mse_loss, timeout=200, **options)


def step(pipe, rows=4):
    return pipe.step(*([x[:rows]] if 0 in pipe.local_stages else []), target=x[:rows])


def interleaved():
    stages = [PipelineStage(nn.Linear(4, 4), n, 6, torch.device("cpu")) for n in (k, k + 3)]
    optimizers = [torch.optim.SGD(stage.submod.parameters(), lr=0.1) for stage in stages]
    return po.InterleavedSchedule(stages, optimizers, nn.functional.mse_loss, timeout=200)


def threads():
    return len(os.listdir("/proc/self/task"))


def told(work):
    began = time.monotonic()
    try:
        work()
    except po.PipeOptimError as error:
        print(f"{type(error).__name__}: {error}")
    assert time.monotonic() - began < 30, "that took as long as a time-out"


def many_in_one_process():
    counts = []
    for n in range(5):
        for pipe in (pipeline(clip=po.Clip(1.0, "global_delayed")), interleaved()):
            step(pipe)
            pipe.drain()
            pipe.close()
        end = time.monotonic() + 30
        while counts and threads() > counts[0] and time.monotonic() < end:  # a thread that was told to end takes its time
            time.sleep(0.01)
        counts.append(threads())
        assert counts[n] <= counts[0], counts


def different_numbers_of_groups():
    if k < 2:
        dist.new_group([0, 1], use_local_synchronization=True)
        for _ in range(2):
            pipe = pipeline((0, 1), pair)
            step(pipe)
            pipe.drain()
            pipe.close()
    pipe = pipeline()
    step(pipe)
    pipe.drain()
    pipe.close()


def closed():
    module = nn.Linear(4, 4)
    pipe = pipeline(own=module, clip=po.Clip(1.0, "global_delayed"))
    step(pipe)
    pipe.drain()
    pipe.close()
    pipe.close()
    pipe.drain()
    full = po.full_state_dict(pipe)  # the processes still meet to export what they have
    state = pipe.stage_state_dict(k)
    assert torch.equal(state["module"]["weight"], module.weight)
    assert state["clip"] is not None
    assert (full is not None) == (k == 0)
    pipe.close()
    told(lambda: step(pipe))
    told(lambda: pipe.eval_step(target=x))


def without_a_drain():
    pipe = pipeline()
    for rows in (4, 2, 3):  # the last gradients announce a new shape, which nobody takes
        step(pipe, rows)
    pipe.close()
    pipe = pipeline()
    step(pipe)
    pipe.close()


def one_cannot_be_set_up():
    told(lambda: pipeline(wrong=k == 1))
    pipe = pipeline()
    step(pipe)
    pipe.drain()
    pipe.close()


def a_replica_that_never_comes():
    """Closing does not wait for an average that one process has begun and the other never will."""
    if k == 2:
        return
    alone = dist.new_group([k], use_local_synchronization=True)
    pipe = pipeline((k,), alone, replicas=pair, liveness_timeout=None)
    if k == 0:
        step(pipe)
        told(pipe.close)
    dist.barrier(group=pair)
    told(pipe.close)


def another_dies():
    pipe = pipeline()
    step(pipe)
    if k == 2:
        print("done", flush=True)
        os._exit(0)
    told(lambda: [step(pipe) for _ in range(20)])
    told(pipe.close)
    told(pipe.close)


for part in (
    many_in_one_process,
    different_numbers_of_groups,
    closed,
    without_a_drain,
    one_cannot_be_set_up,
    a_replica_that_never_comes,
    another_dies,
):
    print(f"- {part.__name__}", flush=True)
    part()
print("done", flush=True)
