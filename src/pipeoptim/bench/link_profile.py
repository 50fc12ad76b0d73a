"""What messages between two processes of this machine cost, and what the engine takes for actions that compute nothing.

Two stages that only pass tensors on train in two processes. Filled (``naive``), each is busy all the time, so that the time of a
mini-batch is what its actions and its messages cost the process itself. Flushed (``gpipe``, M = 1), one mini-batch goes there and back
alone; what that takes beyond the actions is the way of two messages. Of several windows the median counts.
"""

from __future__ import annotations

from statistics import median
from time import perf_counter, sleep
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from pipeoptim.bench.processes import run_on_processes
from pipeoptim.engine import Schedule

SMALL, LARGE = 256, 262_144
"""Numbers of four bytes in a message: 1 kB and 1 MB."""

WINDOW = 20
"""Mini-batches that are timed together."""


class LinkMeasurement(NamedTuple):
    """What was found.

    Attributes:
        latency: seconds of a small message beyond what it costs its sender and its receiver.
        bandwidth: bytes per second; None where the way of a large message takes no longer.
        handling: seconds per byte that a message costs its sender, and as many its receiver.
        per_microbatch, per_minibatch: seconds that a stage which computes nothing takes for F and B, and for the rest of a mini-batch.
    """

    latency: float
    bandwidth: float | None
    handling: float
    per_microbatch: float
    per_minibatch: float


def measure_link(repeats: int = 15, delay: float = 0.0, waits: float = 0.0) -> LinkMeasurement:
    """Measure it, in some seconds.

    Args:
        repeats: windows of each kind.
        delay: seconds that links hold messages back (:mod:`.slow`), not counted in the latency.
        waits: seconds that each F and B waits for a device, not counted either. Code that runs after a wait finds cold caches, and a
            machine that has turned to other work.
    """
    options = {"repeats": repeats, "waits": waits}
    found = run_on_processes("pipeoptim.bench.link_profile:stage", options, 2, threads=1, timeout=600, delay=delay)[0]
    # Per stage F and B of one or of four micro-batches; flushed, those of two stages one after the other.
    actions = {"filled": 2, "filled, M=4": 8, "filled, large": 2, "flushed": 4, "flushed, large": 4}
    found = {name: seconds - actions[name] * waits for name, seconds in found.items()}
    per_microbatch = max(0.0, (found["filled, M=4"] - found["filled"]) / 3)
    per_minibatch = max(0.0, found["filled"] - per_microbatch)
    handling = max(0.0, found["filled, large"] - found["filled"]) / (2 * 4 * (LARGE - SMALL))
    # There and back: F and B on both stages, U on the first, and two messages on their way.
    small = max(0.0, found["flushed"] - 2 * per_microbatch - per_minibatch) / 2
    large = max(0.0, found["flushed, large"] - 2 * per_microbatch - per_minibatch) / 2 - 2 * handling * 4 * (LARGE - SMALL)
    per_byte = (large - small) / (4 * (LARGE - SMALL))
    # Below a tenth of what handling costs it is no limit that could be told from noise.
    return LinkMeasurement(
        max(0.0, small - delay), 1 / per_byte if per_byte > 0.1 * handling else None, handling, per_microbatch, per_minibatch
    )


class _Pass(torch.autograd.Function):
    """Returns what it is given to return, and gradients of zeros, without computing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, output: Tensor, waits: float) -> Tensor:
        sleep(waits)
        ctx.save_for_backward(weight)
        ctx.waits = waits
        ctx.gradient = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        sleep(ctx.waits)
        return ctx.gradient, torch.zeros_like(ctx.saved_tensors[0]), None, None


class _Passing(nn.Module):
    def __init__(self, output: Tensor, waits: float) -> None:
        super().__init__()
        self.waits = waits
        self.weight = nn.Parameter(torch.ones(1))
        self.output = output

    def forward(self, x: Tensor) -> Tensor:
        return _Pass.apply(x, self.weight, self.output[: len(x)], self.waits)  # type: ignore[no-any-return,no-untyped-call]


def stage(repeats: int, waits: float) -> dict[str, float]:
    """The part of one process: seconds of a mini-batch, of each kind."""
    pipes = {
        "filled": _pipe("naive", 1, SMALL, waits),
        "filled, M=4": _pipe("naive", 4, SMALL, waits),
        "filled, large": _pipe("naive", 1, LARGE, waits),
        "flushed": _pipe("gpipe", 1, SMALL, waits),
        "flushed, large": _pipe("gpipe", 1, LARGE, waits),
    }
    samples: dict[str, list[float]] = {name: [] for name in pipes}
    for _ in range(repeats + 1):  # they take turns, and the first one warms up
        for name, (pipe, args, target) in pipes.items():
            dist.barrier()
            start = perf_counter()
            for _ in range(WINDOW):
                pipe.step(*args, target=target)
            samples[name].append((perf_counter() - start) / WINDOW)
    for pipe, *_ in pipes.values():
        pipe.drain()
    return {name: median(found[1:]) for name, found in samples.items()}


def _pipe(method: str, m: int, numbers: int, waits: float) -> tuple[Schedule, tuple[Tensor, ...], Tensor | None]:
    k = dist.get_rank()
    module = _Passing(torch.zeros(m, numbers if k == 0 else 1), waits)
    place = PipelineStage(module, k, 2, torch.device("cpu"))
    pipe = Schedule(place, torch.optim.SGD(module.parameters(), lr=0.0), _loss, method, m, liveness_timeout=None)
    x = torch.zeros(m, 1)
    return pipe, ((x,) if k == 0 else ()), (x if k == 1 else None)


def _loss(output: Tensor, _: Tensor) -> Tensor:
    return output.sum()
