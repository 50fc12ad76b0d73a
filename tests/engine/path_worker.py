"""One of two stages: prints the package's files that are between `step` and the optimizer's kernel, in the order of the calls."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage

import pipeoptim as po

ROOT = Path(po.__path__[0])
KERNEL = ROOT / "kernels" / "calls.py"


def calls_to(frame):
    """Files of the package from the outermost call to ``frame``, each once."""
    found = []
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT):
            found.append(path.relative_to(ROOT).as_posix())
        frame = frame.f_back
    return list(dict.fromkeys(reversed(found)))


def paths_of(step):
    """What stands on the stack each time ``step`` comes to run the kernel."""
    seen = []

    def watch(frame, event, _):
        if event == "call" and frame.f_code.co_name == "run" and frame.f_code.co_filename == str(KERNEL):
            seen.append(calls_to(frame))

    sys.setprofile(watch)
    try:
        step()
    finally:
        sys.setprofile(None)
    return seen


if __name__ == "__main__":
    torch.set_num_threads(1)
    k = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    module, x = nn.Linear(4, 4), torch.ones(4, 4)
    optimizer = torch.optim.AdamW(module.parameters())
    pipe = po.Schedule(PipelineStage(module, k, 2, torch.device("cpu")), optimizer, nn.functional.mse_loss, timeout=100)
    inputs, keywords = ([x], {}) if k == 0 else ([], {"target": x})
    for _ in range(5):  # the first updates make the optimizer's state and the copies of weights
        pipe.step(*inputs, **keywords)
    found = paths_of(lambda: pipe.step(*inputs, **keywords))
    pipe.drain()
    pipe.close()
    dist.destroy_process_group()
    print(json.dumps(found))
