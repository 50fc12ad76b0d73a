"""One process of 2 stages x 2 replicas: runs the cases of layout_cases and writes what this process ends with."""

import sys
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.nn.parallel import DistributedDataParallel

import layout_cases as cases
import pipeoptim as po
from pipeoptim.engine.replicas import reduction

out, which = sys.argv[1], sys.argv[2]
torch.set_num_threads(1)
reduction.BUCKET_BYTES = 300  # several buckets for these small layers
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (cases.REPLICAS, cases.DEPTH), mesh_dim_names=("data", "pipe"))
k, replica = mesh["pipe"].get_local_rank(), mesh["data"].get_local_rank()
first, last = k == 0, k == cases.DEPTH - 1


def schedule(module, opt, m=1, method="pipeoptim", **options):
    stage = PipelineStage(module, k, cases.DEPTH, torch.device("cpu"), group=mesh["pipe"].get_group())
    return po.Schedule(stage, opt, nn.functional.mse_loss, method, m, seed=3, timeout=200, **options)


def feed(pipe, x, y, m=1, how="step"):
    x, y = cases.share(x, m, replica), cases.share(y, m, replica)
    return getattr(pipe, how)(*([x] if first else []), target=y if last else None)


def equal_case(case):
    module = cases.module(case, k)
    options = {"replicas": mesh["data"]}
    if case.wrap == "ddp":
        module = DistributedDataParallel(module, process_group=mesh["data"].get_group(), find_unused_parameters=case.odd)
        options = {}
    elif case.wrap == "fsdp":
        fully_shard(module[0], mesh=mesh["data"])
        fully_shard(module, mesh=mesh["data"])  # the root keeps the rest, which torch would not free after a forward
        options = {}
    elif replica == 1:
        with torch.no_grad():
            for p in module.parameters():
                p.add_(1.0)  # the first replica's weights are those that count
    if case.overlap:
        options["overlap"] = True
    if case.tied:
        options["tied"] = cases.TIED
    opt = cases.optimizer(case, module.parameters())
    options |= {"scheduler": cases.scheduler(opt), "clip": case.clip, "prediction": case.prediction}
    pipe = schedule(module, opt, case.m, case.method, **options)
    losses = []
    for n, (x, y) in enumerate(cases.batches()):
        losses.append(feed(pipe, x, y, case.m))
        if n == 5:
            losses.append(feed(pipe, x, y, how="eval_step"))
    pipe.drain()
    pipe.close()
    state = pipe.stage_state_dict(k)
    assert pipe.version(k) == cases.UPDATES
    weights = {name: whole(value) for name, value in state["module"].items()}
    return {
        "module": weights,
        "bytes": pipe.weight_bytes(k),
        "losses": losses,
        "gaps": [pipe.version_gap(k, i) for i in range(case.m)],
    }


def noisy():
    torch.manual_seed(k)
    return nn.Sequential(nn.Dropout(0.3), nn.Linear(cases.WIDTH, cases.WIDTH), nn.BatchNorm1d(cases.WIDTH), nn.Tanh()).double()


def whole(value):
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def resumed():
    """Six mini-batches in one go; and four, a state that only the first replica saves, and two more."""
    found, batches = {}, [(torch.cat([x, x]).float(), torch.cat([y, y]).float()) for x, y in list(cases.batches())[:6]]
    options = {"replicas": mesh["data"], "compress": po.Compression("int8", "int8", "both")}
    for name, stop in (("whole", 6), ("halves", 4)):
        module = noisy().float()
        pipe = schedule(module, torch.optim.AdamW(module.parameters()), **options)
        for n, (x, y) in enumerate(batches):
            if n == stop:
                pipe.drain()
                state, path = pipe.stage_state_dict(k), f"{out}/saved-{k}.pt"
                if replica == 0:
                    torch.save(state, path)
                dist.barrier()
                pipe.close()
                module = noisy().float()
                pipe = schedule(module, torch.optim.AdamW(module.parameters()), **options)
                pipe.load_stage_state_dict(k, torch.load(path, weights_only=True))
            elif n == 4:
                pipe.drain()
            feed(pipe, x, y)
        pipe.drain()
        pipe.close()
        found[name] = pipe.stage_state_dict(k)
    return found


def in_progress(overlap):
    """Both replicas are fed the same, so that the mean of their gradients is the gradient of each."""
    module = cases.module(cases.Case(), k)
    options = {
        "replicas": mesh["data"],
        "overlap": overlap,
        "clip": po.AdaGC(lambda_abs=0.05, warmup=3),
        "prediction": "in_progress",
        "scale": "auto",
    }
    pipe = schedule(module, torch.optim.AdamW(module.parameters(), lr=0.01), 4, **options)
    for x, y in cases.batches():
        pipe.step(*([x] if first else []), target=y if last else None)
    pipe.drain()
    pipe.close()
    return pipe.stage_state_dict(k)["module"]


def skipping(wrapped):
    """Mini-batch 2 is bad on the first replica, mini-batch 4 on the second, both are on neither."""
    module = cases.module(cases.Case(), k)
    if wrapped:
        module = DistributedDataParallel(module, process_group=mesh["data"].get_group())
    options = {} if wrapped else {"replicas": mesh["data"]}
    pipe = schedule(module, torch.optim.AdamW(module.parameters(), lr=0.01), on_bad="skip", **options)
    for x, y in cases.spoiled():
        feed(pipe, x, y)
    pipe.drain()
    pipe.close()
    return pipe.skipped(k), pipe.stage_state_dict(k)["module"]


def stopped():
    """Replica 1 asks for a stop while it is fed its third mini-batch; how many each process was fed."""
    module = noisy()
    pipe = schedule(module, torch.optim.AdamW(module.parameters()), replicas=mesh["data"])
    fed = 0
    for x, y in [*cases.batches()] * 2:
        if fed == 2 and first and replica == 1:
            pipe.request_stop()
        feed(pipe, x, y)
        fed += 1
        if pipe.stop_requested:
            break
    pipe.drain()
    pipe.close()
    return fed


def order_of_work(**options):
    """When the means were begun, and when the backward of the first layer ended."""
    log, module = [], cases.module(cases.Case(), k)
    pipe = schedule(module, torch.optim.AdamW(module.parameters()), replicas=mesh["data"], **options)
    plain, finish = reduction.BucketedReduction._reduce_bucket, reduction.BucketedReduction.finish
    reduction.BucketedReduction._reduce_bucket = lambda self, n: (log.append(f"mean {n}"), plain(self, n))[1]
    reduction.BucketedReduction.finish = lambda self: (log.append("finish"), finish(self))[1]
    module[0].weight.register_post_accumulate_grad_hook(lambda _: log.append("first layer"))
    module.register_forward_pre_hook(lambda *_: log.append("forward"))
    for x, y in list(cases.batches())[:3]:
        feed(pipe, x, y)
    pipe.drain()
    pipe.close()
    reduction.BucketedReduction._reduce_bucket, reduction.BucketedReduction.finish = plain, finish
    return log


def refusals():
    words, module = [], cases.module(cases.Case(), k)
    for options in ({"replicas": mesh["pipe"]}, {"replicas": "two"}, {"replicas": mesh["data"], "clip": 1.0 + replica}):
        words.append(refused(module, torch.optim.AdamW(module.parameters()), **options))
    sharded = cases.module(cases.Case(), k)
    fully_shard(sharded[0], mesh=mesh["data"])
    adamw = torch.optim.AdamW
    words.append(refused(sharded, adamw(sharded.parameters())))
    fully_shard(sharded, mesh=mesh["data"])
    wrong = (
        {"scaler": torch.amp.GradScaler("cpu")},
        {"method": "spectrain"},
        {"uneven": True},
        {"tied": cases.TIED},
        {"prediction": "in_progress"},
        {"on_bad": "skip"},
    )
    for options in wrong:
        words.append(refused(sharded, adamw(sharded.parameters()), **options))
    wrapper = DistributedDataParallel(module, process_group=mesh["data"].get_group(), static_graph=True)
    words.append(refused(wrapper, adamw(wrapper.parameters())))
    if first:  # the last stage predicts nothing; it would wait for the first
        words.append(refused(sharded, torch.optim.Adafactor(sharded.parameters())))
    return words


def refused(module, opt, **options):
    try:
        schedule(module, opt, **options)
    except po.ConfigError as error:
        return str(error)
    return "accepted"


def extras():
    found = {
        "resumed": resumed(),
        "in_progress": [in_progress(overlap) for overlap in (False, True)],
        "skipping": [skipping(wrapped) for wrapped in (False, True)],
        "stopped": stopped(),
        "order": order_of_work(),
        "overlap": order_of_work(overlap=True),
        "refusals": refusals(),
    }
    torch.save(found, f"{out}/extras-{k}-{replica}.pt")


todo = {"plain": cases.plain(), "ddp": [replace(c, wrap="ddp") for c in cases.wrapped()]}
todo["fsdp"] = [replace(c, wrap="fsdp") for c in cases.sharded()]
for name in which.split(","):
    if name == "extras":
        extras()
        continue
    for case in todo[name]:
        torch.save(equal_case(case), f"{out}/{case.name()}-{k}-{replica}.pt")
dist.destroy_process_group()
