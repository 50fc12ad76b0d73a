"""A user's script for ``torchrun --max-restarts``: saves, goes on, and kills itself once, between two checkpoints. FOLDER"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage

import pipeoptim as po
from exactly import assert_equal

STEPS, EVERY = 14, 4


def stages():
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1)), nn.Linear(8, 1)]


def batch(n):
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(n))
    return x, x[:, :1]


class Seen:
    """What a stage's script keeps beside its pipeline, each stage another one."""

    def __init__(self, k):
        self.numbers = [k]

    def state_dict(self):
        return {"numbers": self.numbers}

    def load_state_dict(self, state):
        self.numbers = state["numbers"]


def undisturbed():
    """The states of all stages at the end, emulated."""
    pipe = po.Emulator(stages(), lambda p: torch.optim.AdamW(p, lr=0.01), nn.functional.mse_loss)
    for n in range(STEPS):
        x, target = batch(n)
        pipe.step(x, target=target)
        if (n + 1) % EVERY == 0:
            pipe.drain()
    pipe.drain()
    return [pipe.stage_state_dict(k) for k in range(2)]


def main(folder):
    torch.set_num_threads(1)
    po.init_process_group("gloo")
    k = dist.get_rank()
    module = stages()[k]
    stage = PipelineStage(module, k, 2, torch.device("cpu"))
    pipe = po.Schedule(stage, torch.optim.AdamW(module.parameters(), lr=0.01), nn.functional.mse_loss)
    seen = Seen(10 * k)
    with po.Checkpointer(pipe, folder / "checkpoints", every=EVERY, state={f"seen {k}": seen}) as checkpoints:
        start = checkpoints.resume()
        (folder / f"begun-{os.environ['TORCHELASTIC_RESTART_COUNT']}-{k}").write_text(str(start))
        for n in range(start, STEPS):
            if (n, k, start) == (6, 1, 0):
                while not (folder / "checkpoints" / "step-000004").exists():  # it is written while training goes on
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)
            x, target = batch(n)
            seen.numbers.append(n)
            pipe.step(*([x] if k == 0 else []), target=target if k == 1 else None)
            checkpoints.after_step(n + 1)
    pipe.drain()
    assert seen.numbers == [10 * k, *range(STEPS)]
    assert_equal(undisturbed()[k], pipe.stage_state_dict(k), f"stage {k}")
    pipe.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
