"""One stage: train, save in the foreground and in the background, export, load again, and say what came out."""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage

import pipeoptim as po
import state_case


def main() -> None:
    folder, source = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    k, depth = dist.get_rank(), dist.get_world_size()

    def build(kind="adamw"):
        stages = state_case.cut(depth, dropout=0.1)
        optimizer = state_case.OPTIMIZERS[kind](stages[k].parameters())
        pipe = po.Schedule(
            PipelineStage(stages[k], k, depth, torch.device("cpu")),
            optimizer,
            torch.nn.functional.cross_entropy,
            scheduler=state_case.schedule(optimizer),
            seed=5,
            timeout=60,
        )
        return pipe, stages[k]

    def train(pipe, steps):
        for n in steps:
            x, y = state_case.batch(n)
            pipe.step(*((x,) if k == 0 else ()), target=y if k == depth - 1 else None)
        pipe.drain()

    pipe, module = build()
    assert not po.load_sharded(pipe, source)  # it was cut into three
    train(pipe, range(6, 9))
    saving = po.save_sharded(pipe, folder / "nine", background=True)
    train(pipe, range(9, 12))  # while it is written
    saving.result(60)
    po.save_weights(pipe, folder / "weights")
    full = po.full_state_dict(pipe)
    assert (full is None) == (k > 0)
    if full is not None:
        torch.save(full, folder / "full.pt")
    pipe.close()

    again, module2 = build()
    assert po.load_sharded(again, folder / "nine")
    train(again, range(9, 12))
    equal = all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), module2.state_dict().values(), strict=True))
    again.close()
    wrong, _ = build("sgd" if k == 1 else "adamw")
    try:
        po.load_sharded(wrong, folder / "nine")
        refused = ""
    except po.ConfigError as error:
        refused = str(error)
    wrong.close()
    print(json.dumps({"equal": equal, "refused": refused}))
    dist.destroy_process_group()


main()
