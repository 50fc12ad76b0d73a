"""Two stages that make the mistakes users make, and print what they are told."""

import os
import warnings

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage

import pipeoptim as po
from pipeoptim.partitioning import BlockCost

k = int(os.environ["RANK"])
dist.init_process_group("gloo")
module = torch.nn.Linear(4, 4)
opt = torch.optim.SGD(module.parameters(), lr=0.1)
stage = PipelineStage(module, k, 2, torch.device("cpu"))
loss_fn = torch.nn.functional.mse_loss


def told(work):
    try:
        work()
    except po.PipeOptimError as error:
        print(error)


torch.set_num_threads(len(os.sched_getaffinity(0)) + 1)  # what torch does by itself, and one more where there is a single core
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    pipe = po.Schedule(stage, opt, loss_fn, "gpipe", 3, timeout=30, seed=0)
print("warned:", *(warning.message for warning in caught))
torch.set_num_threads(1)
x = torch.ones(4, 4)
told(lambda: pipe.step(x, target=x))
told(lambda: po.Schedule(module, opt, loss_fn))
dist.barrier()
told(lambda: po.Schedule(stage, opt, loss_fn, "naive" if k else "pipeoptim", seed=0, timeout=30))
po.Schedule(stage, opt, loss_fn, po.get_method("pipeoptim"), seed=0, timeout=30).close()
told(lambda: po.Schedule(stage, opt, loss_fn, prediction="paper" if k else "refined", seed=0, timeout=30))
dist.barrier()
pipe.close()

# One process alone: who sends has nothing to wait for, who receives hears whom it waited for.
pipe = po.Schedule(stage, opt, loss_fn, timeout=1, seed=0)
if k == 1:
    told(lambda: pipe.eval_step(target=x))
    told(lambda: pipe.step())
dist.barrier()
told(pipe.close)

# The model is cut in every process: by what each measured itself, then by what the first measured for all.
blocks = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(4)))
seconds = [[1, 1, 1, 3], [3, 1, 1, 1]][k]
costs = [BlockCost(str(n), s, s, 16, 16, 80) for n, s in enumerate(seconds)]


def pipeline_of(cut):
    own = torch.nn.Sequential(cut.stages[k])  # as users wrap them
    return po.Schedule(PipelineStage(own, k, 2, torch.device("cpu")), torch.optim.SGD(own.parameters()), loss_fn, timeout=30)


told(lambda: pipeline_of(po.partition(blocks, 2, costs=costs)))
dist.barrier()
together = po.partition(blocks, 2, (x,), group=dist.group.WORLD)
pipeline_of(together).close()
print("measured", [cost.forward for cost in together.costs], together.lengths)
