"""The processes of the runs that test_partition_processes compares with the emulator: pipelines of 2, 3 and 4 of them.

One process imports everything and forks the others, which saves them a slow start.
"""

import copy
import json
import os
import sys
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import transformers  # noqa: F401  so that the forks have it
from torch.distributed.pipelining import PipelineStage

import partition_models as models
import pipeoptim as po


def run(k: int, depth: int, out: str, names: list[str]) -> None:
    """Be stage k of pipelines of this depth."""
    torch.set_num_threads(1)
    meet = f"file://{out}/meet-{depth}"
    dist.init_process_group("gloo", init_method=meet, rank=k, world_size=depth, timeout=timedelta(seconds=120))
    for name in names:
        exported = f"{out}/{name}-{depth}-exported" if name.endswith("_tied") else ""
        found = train(k, depth, models.case(name), models.equal_costs(name), exported)
        torch.save(found, f"{out}/{name}-{depth}-{k}.pt")
    dist.destroy_process_group()


def train(k: int, depth: int, case, costs, exported: str):
    cut = po.partition(case.model, depth, case.args, case.kwargs, costs=costs)
    stage = cut.stages[k]
    torch.manual_seed(3)
    inside = Around(stage) if depth == 3 and k == 2 else stage  # as users wrap them
    place = PipelineStage(inside, k, depth, torch.device("cpu"))
    pipe = po.Schedule(place, models.optimizer(stage.parameters()), case.loss, timeout=60, tied=cut.tied)
    losses = []
    for args, kwargs, target in models.feeds(case):
        first = (args, kwargs) if k == 0 else ([], {})
        losses.append(pipe.step(*first[0], target=target if k == depth - 1 else None, **first[1]))
    pipe.drain()
    state, told = copy.deepcopy(stage.state_dict()), []
    if exported:
        po.check_export(pipe, exported)
        po.save_weights(pipe, exported)
        told.append(refusal(lambda: po.check_export(pipe, exported)))
        if k == 0:
            with torch.no_grad():
                next(stage.parameters()).add_(1)  # the embedding: its copy on the last stage stays
        told.append(refusal(lambda: po.save_weights(pipe, exported, overwrite=True)))
    pipe.close()
    return {"state": state, "losses": losses, "told": told}


class Around(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def refusal(work) -> str:
    try:
        work()
    except po.ConfigError as error:
        return str(error)
    return ""


def main() -> int:
    out, runs = sys.argv[1], json.loads(sys.argv[2])  # depth -> models
    codes = []
    for depth, names in runs.items():
        started = [fork(k, int(depth), out, names) for k in range(int(depth))]
        codes += [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in started]
    return max(map(abs, codes))


def fork(k: int, depth: int, out: str, names: list[str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        run(k, depth, out, names)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
