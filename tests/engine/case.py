"""A small run with everything in it that could differ between engines: dropout, BatchNorm, momentum, an lr schedule."""

import torch
from torch import nn

UPDATES = 50
BATCH = 8


def model():
    torch.manual_seed(7)
    return [
        nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
        nn.Sequential(nn.Dropout(0.2), nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.Tanh()),
        nn.Sequential(nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 12)),
        nn.Sequential(nn.Dropout(0.1), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 5)),
    ]


def pieces(depth):
    blocks = model()
    per = len(blocks) // depth
    return [nn.Sequential(*blocks[k * per : (k + 1) * per]) for k in range(depth)]


def batches(device="cpu"):
    g = torch.Generator().manual_seed(1)
    for _ in range(UPDATES):
        yield torch.randn(BATCH, 1, 4, 4, generator=g).to(device), torch.randint(5, (BATCH,), generator=g).to(device)


def optimizer(name, params):
    if name == "sgd":
        return torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-3)
    return torch.optim.AdamW(params, lr=0.01)


def scheduler(opt):
    return torch.optim.lr_scheduler.CosineAnnealingLR(opt, UPDATES)


def predicted(run):
    """Method and options of ``run``, which may name a refresh of predictions from the mini-batch in progress: ``pipeoptim/2``."""
    method, _, refresh = run.partition("/")
    return method, {"prediction": "in_progress", "refresh": int(refresh)} if refresh else {}


def file_name(*parts):
    return "-".join(map(str, parts)).replace("/", "~") + ".pt"


def loss_fn(output, target):
    return nn.functional.cross_entropy(output, target)
