"""One stage of the runs that test_distributed compares with the emulator; writes its final state for every method."""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage

import case
import pipeoptim as po
from late_streams import LateStreams
from pipeoptim.engine.processes import connect

out, methods, cases = sys.argv[1], sys.argv[2].split(","), [tuple(c.split(":")) for c in sys.argv[3].split(";")]
device = torch.device(sys.argv[4])
torch.set_num_threads(1)
torch.backends.cudnn.deterministic = True
k, depth = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo")
late = LateStreams(k, *sys.argv[6:]) if "late" in sys.argv[5:] else None  # as on a device, but for the device
for run in methods:
    method, options = case.predicted(run)
    if late is not None:
        own = None if method == "1f1b" and k > 0 else late  # there a stage on a CPU beside one on a device
        connect.side_streams = lambda device, own=own: own
    for m, name, slack in cases:
        if po.get_method(method).at_least_depth_microbatches and int(m) < depth:
            continue
        module = case.pieces(depth)[k].to(device)
        opt = case.optimizer(name, module.parameters())
        torch.manual_seed(3)
        torch.rand(k)  # the user's own random numbers must not matter
        stage = PipelineStage(module, k, depth, device)
        transport = "auto" if name == "adamw" else "group"
        options |= {"transport": transport, "timeout": 60, "slack": slack}
        pipe = po.Schedule(stage, opt, case.loss_fn, method, int(m), scheduler=case.scheduler(opt), **options)
        links = [*pipe._connections.receivers, *pipe._connections.senders]
        assert all((link.channel is None) == (transport == "group") for link in links)
        assert bool(pipe.rendezvous._groups) == (transport == "group")  # one that nobody uses takes time all the same
        losses = []
        for n, (x, y) in enumerate(case.batches(device)):
            losses.append(pipe.step(*([x] if k == 0 else []), target=y if k == depth - 1 else None))
            if n == 20:
                pipe.drain()
            if n in (25, 30):
                x, y = x[:5], y[:5]
                losses.append(pipe.eval_step(*([x] if k == 0 else []), target=y if k == depth - 1 else None, drain=n == 30))
        pipe.drain()
        pipe.close()
        state = pipe.stage_state_dict(k)
        torch.save({"state": state, "losses": losses, "version": pipe.version(k)}, f"{out}/{case.file_name(run, m, name, k)}")
if late is not None:
    late.check()
dist.destroy_process_group()
