"""One stage of the default recipe with every optimizer, one after the other; writes what it ends with."""

import os
import sys

import torch
import torch.distributed as dist

import optimizer_cases as cases
from pipeoptim.train import engines

torch.set_num_threads(1)
k = int(os.environ["RANK"])
dist.init_process_group("gloo")
found = {}
for name in cases.CASES:
    run = cases.run_setup(name)
    pipe, _ = engines.make_schedule(run, [k], run.task.loss, None)
    found[name] = cases.train(run, pipe)[k]
    pipe.close()
torch.save(found, f"{sys.argv[1]}/{k}.pt")
dist.destroy_process_group()
