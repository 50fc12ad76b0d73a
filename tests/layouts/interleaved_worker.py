"""One of two processes with two stages each; writes the final state of its stages for every method and case."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
import case
import interleaved_cases as cases
import pipeoptim as po
from pipeoptim.engine.stage_times import WINDOW

out = sys.argv[1]
torch.set_num_threads(1)
dist.init_process_group("gloo")
p = dist.get_rank()


def setup(method, m, name, overlap=False, slack=0, **options):
    modules = {k: case.pieces(4)[k] for k in (p, p + 2)}
    opts = [case.optimizer(name, module.parameters()) for module in modules.values()]
    stages = [PipelineStage(module, k, 4, torch.device("cpu")) for k, module in modules.items()]
    rates = [case.scheduler(opt) for opt in opts]
    options = {"overlap": overlap, "slack": slack, "clip": 1.0, **options}
    return po.InterleavedSchedule(stages, opts, case.loss_fn, method, m, schedulers=rates, seed=3, timeout=200, **options)


for run in cases.runs():
    method, options = case.predicted(run[0])
    pipe, losses = setup(method, *run[1:], **options), []
    for n, (x, y) in enumerate(cases.batches()):
        data = {"target": y} if p == 1 else {}
        losses.append(pipe.step(*([x] if p == 0 else []), **data))
        if n == 7:
            losses.append(pipe.eval_step(*([x] if p == 0 else []), **data))
    pipe.drain()
    pipe.close()
    for k in pipe.local_stages:
        found = {"state": pipe.stage_state_dict(k), "losses": losses, "gap": pipe.version_gap(k)}
        torch.save(found, f"{out}/{case.file_name(*run, k)}")

pipe = setup("pipeoptim", 1, "adamw", False)
for fed, (x, y) in enumerate(cases.batches()):
    if p == 0 and fed == 3:
        pipe.request_stop()
    pipe.step(*([x] if p == 0 else []), target=y if p == 1 else None)
    if pipe.stop_requested:
        break
print("fed", fed)
pipe.drain()
pipe.close()
pipe = setup("pipeoptim", 1, "adamw", slack="auto")
x, y = next(cases.batches())
for _ in range(WINDOW + 2 + 4 + 1):
    pipe.step(*([x] if p == 0 else []), target=y if p == 1 else None)
print("chose", pipe.slack)
pipe.drain()
pipe.close()
setup(po.get_method("pipeoptim"), 1, "adamw").close()  # the object is another one in each process, the method is not
for option, value in cases.DIFFERENT.items():
    try:
        setup("pipeoptim", 1, "adamw", **({option: value} if p else {}))
    except po.ConfigError as error:
        print("refused", option, error)
setup("pipeoptim", 1, "adamw", scaler=lambda: torch.amp.GradScaler("cpu")).close()
try:
    setup("pipeoptim", 1, "adamw", scaler=torch.amp.GradScaler("cpu"))
except po.ConfigError as error:
    print(error)
stage = PipelineStage(torch.nn.Linear(1, 1), 1 - p, 4, torch.device("cpu"))
for stages in ([stage, stage], [stage]):
    try:
        po.InterleavedSchedule(stages, [None] * len(stages), case.loss_fn)
    except po.ConfigError as error:
        print(error)
dist.destroy_process_group()
