"""One of two stages under ``method="auto"``: equal to the emulator bit for bit, and refused where the other calls for another method."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage

import pipeoptim as po

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()


def modules():
    torch.manual_seed(0)
    return [nn.Linear(4, 4) for _ in range(2)]


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01)


def schedule(piece, optimizer, m):
    stage = PipelineStage(piece, rank, 2, torch.device("cpu"))
    return po.Schedule(stage, optimizer, nn.functional.mse_loss, "auto", m, timeout=120)


for m, prediction in ((2, "in_progress"), (1, "refined")):
    own, emulated = modules()[rank], modules()
    pipe = schedule(own, adamw(own.parameters()), m)
    assert (pipe.method.name, pipe.options.prediction) == ("pipeoptim", prediction)
    emulator = po.Emulator(emulated, adamw, nn.functional.mse_loss, "auto", m)
    for i in range(5):
        x = torch.full((2 * m, 4), float(i + 1))
        pipe.step(*([x] if rank == 0 else []), **({"target": -x} if rank == 1 else {}))
        emulator.step(x, target=-x)
    pipe.drain()
    emulator.drain()
    pipe.close()
    assert all(map(torch.equal, own.parameters(), emulated[rank].parameters()))
own = modules()[rank]
other = adamw(own.parameters()) if rank == 0 else torch.optim.SGD(own.parameters(), lr=0.1)
with pytest.raises(po.ConfigError, match="method=(pipeoptim|naive) .* method=(pipeoptim|naive)"):
    schedule(own, other, 1)
print("done", flush=True)
