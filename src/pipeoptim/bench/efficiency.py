"""How close the engine comes to its limit: stages that wait instead of computing, so that their time is known.

A stage emulates a device of fixed speed: the forward of a whole mini-batch takes t, the backward 2t, and a micro-batch its share
of them. Its one small layer is really computed, within that time and not on top of it. The limit of an asynchronous pipeline is
one mini-batch per time of the slowest stage, so ``efficiency = mini-batches per second x slowest stage's seconds per
mini-batch``, 1 at best. Whatever is missing is overhead of the engine and of the transfers, the optimizer's step and the loss
included, or, with synchronous schedules, the bubble. Many stages fit on few cores, since they wait.

What of it is not a pipeline's at all shows a reference beside the contenders: on every process a plain PyTorch loop (forward,
backward, step of torch's fused optimizer) trains its stage alone on the same device, all of them at once, and sends nothing.
"""

from __future__ import annotations

import ctypes
import math
import os
import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from pipeoptim.bench.checks import divide, runnable
from pipeoptim.bench.processes import run_on_processes
from pipeoptim.bench.record import Record, ResultRow
from pipeoptim.bench.rivals import TORCH, Step, possible, rival_step
from pipeoptim.bench.slack_model import ideal_windows
from pipeoptim.engine import Schedule
from pipeoptim.methods import get_method
from pipeoptim.schedule import Program, read_slack

BATCH = 16
RIVALS = [name for name in TORCH if name != "ScheduleZBVZeroBubble"]  # it calls one backward twice, and would wait twice
_SPIN = 0.00006  # seconds: the end of a wait is spun, since a sleep returns late
_PR_SET_TIMERSLACK = 29
ALONE = "plain loops, no pipeline"


class Device:
    """A device of fixed speed.

    Args:
        seconds: for the forward of a mini-batch.
        jitter: sigma of a log-normal factor.
        seed: of the jitter.

    Attributes:
        busy: seconds of work so far: what was asked for, and where the layer itself took longer, that.
    """

    def __init__(self, seconds: float, jitter: float, seed: int) -> None:
        self.seconds, self.jitter = seconds, jitter
        self.random = random.Random(seed)
        self.busy = self._began = 0.0
        _sleep_exactly()

    def begin(self) -> None:
        """Work begins now."""
        self._began = time.perf_counter()

    def finish(self, share: float) -> None:
        """Return when the work since :meth:`begin` took what ``share`` of a mini-batch's forward takes."""
        factor = self.random.lognormvariate(0.0, self.jitter) if self.jitter else 1.0
        wanted = self.seconds * share * factor
        end, now = self._began + wanted, time.perf_counter()
        self.busy += max(wanted, now - self._began)
        if end - now > _SPIN:
            time.sleep(end - now - _SPIN)
        while time.perf_counter() < end:
            pass


def _sleep_exactly() -> None:
    """Ask Linux to end this thread's sleeps on time; by default they may be 50 microseconds late."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)


def stay_on_a_core() -> None:
    """Share the cores out among the stages, so that no figure depends on where the scheduler puts them."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[dist.get_rank() % len(cores)]})


class _SimulatedWork(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, device: Device, part: float) -> Tensor:
        device.begin()
        ctx.device, ctx.share = device, part * x.shape[0] / BATCH
        ctx.save_for_backward(x, weight)
        y = torch.addmm(bias, x, weight)
        device.finish(ctx.share)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.device.begin()
        (gradient,), (x, weight) = gradients, ctx.saved_tensors
        of_x = gradient @ weight.t() if ctx.needs_input_grad[0] else None
        of_weight, of_bias = x.t() @ gradient, gradient.sum(0)
        ctx.device.finish(2 * ctx.share)
        return of_x, of_weight, of_bias, None, None


class WaitingStage(nn.Module):
    """A stage of one small layer whose time is that of its device, or the given part of it where several stages share one."""

    def __init__(self, device: Device, width: int, part: float = 1.0) -> None:
        super().__init__()
        self.part = part
        self.weight = nn.Parameter(torch.eye(width) / 2)
        self.bias = nn.Parameter(torch.zeros(width))
        self.device = device

    def forward(self, x: Tensor) -> Tensor:
        """The layer, and the wait."""
        return _SimulatedWork.apply(x, self.weight, self.bias, self.device, self.part)  # type: ignore[no-any-return,no-untyped-call]


def measure(
    depths: list[int],
    milliseconds: list[float],
    methods: list[str] | None = None,
    microbatches: list[int] | None = None,
    torch_microbatches: list[int] | None = None,
    jitter: float = 0.0,
    uneven: float = 0.0,
    delay: float = 0.0,
    bandwidth: float = 0.0,
    transport: str = "auto",
    slack: str = "0",
    refresh: list[int] | None = None,
    width: int = 256,
    repeats: int = 9,
    steps: int = 40,
) -> Record:
    """Measure every combination of depth, stage time and contender.

    Args:
        depths: numbers of stages, each with one process of one thread, which stays on one core; contenders of all kinds alike.
        milliseconds: time of a stage for F and B of a mini-batch together (F one third of it).
        methods, microbatches: contenders of this library and their M.
        torch_microbatches: M of torch's ScheduleGPipe, Schedule1F1B and ScheduleInterleaved1F1B (two stages per process, each with
            half of the device's time).
        jitter: sigma of the log-normal factor on every wait.
        uneven: how much slower than the others the middle stage is, as a share.
        delay: seconds that a message takes more than its bytes do.
        bandwidth: of each link and direction in bytes per second; 0 for no limit.
        transport: "group" to send through gloo, as torch's schedules do, also where processes share this machine; then only the
            methods are measured.
        slack: of the methods, see :class:`~pipeoptim.Schedule`.
        refresh: methods that predict by the optimizer's rule are measured as well with predictions from the mini-batch in progress, made
            anew after so many micro-batches.
        width: numbers per sample that travel between stages.
        repeats, steps: windows per contender, and mini-batches per window. Plain loops and the methods of one M take turns.

    Raises:
        ConfigError: a method is unknown or not defined for a depth and M, or an M does not divide the mini-batch.
    """
    divide([BATCH], microbatches=microbatches, torch_microbatches=torch_microbatches)
    runnable(methods or [], depths, microbatches or [1], slack)
    options = {
        "methods": methods or ["pipeoptim", "naive"],
        "microbatches": microbatches or [1],
        "torch_microbatches": torch_microbatches or [],
        "milliseconds": milliseconds,
        "jitter": jitter,
        "uneven": uneven,
        "delay": delay,
        "bandwidth": bandwidth,
        "gloo": transport == "group",
        "slack": slack,
        "refresh": refresh or [],
        "width": width,
        "repeats": repeats,
        "steps": steps,
    }
    rows = []
    for depth in depths:
        found = run_on_processes(
            "pipeoptim.bench.efficiency:stage", options, depth, threads=1, timeout=900, delay=delay, bandwidth=bandwidth
        )
        rows += [ResultRow(**row) for row in found[0]]
    return Record("efficiency", "efficiency", {"width": width, "repeats": repeats, "each stage": "stays on one core"}, rows)


@dataclass(frozen=True)
class _Contender:
    """One of those that take turns on the same processes.

    Attributes:
        name, m: of the method or schedule, and its micro-batches.
        make: its step.
        options: of the measurement, and of its own.
    """

    name: str
    m: int
    milliseconds: float
    make: Callable[..., Step]
    options: dict[str, Any]

    def row(self, samples: list[float], alone: float | None) -> dict[str, Any]:
        """Of the result file; ``alone`` is the efficiency of the plain loops beside it."""
        options, ours = self.options, self.make is not _torchs
        settings = {"method": self.name, "microbatches": self.m, "depth": dist.get_world_size()}
        settings |= {"milliseconds": self.milliseconds, "ours": ours}
        settings |= {what: options[what] for what in ("uneven", "jitter", "delay", "bandwidth", "gloo")}
        how = ""
        if self.make is _ours:
            settings |= {} if alone is None else {"plain loops": alone}
            settings |= _ideal(self.name, self.m, alone, options)
            settings |= {what: options[what] for what in ("slack", "refresh") if _chosen(options, what)}
            how = _how(settings)
        conditions_ = f"D={settings['depth']}, {self.milliseconds:g} ms{conditions(options)}"
        return {"name": f"{self.name} M={self.m}{how}, {conditions_}", "samples": samples, "settings": settings}


def stage(**options: Any) -> list[dict[str, Any]]:
    """The part of one process."""
    stay_on_a_core()
    rows = []
    for milliseconds in options["milliseconds"]:
        for m in options["microbatches"]:
            rows += _in_turn(_contenders(milliseconds, m, options), options)
        for m in [] if options["gloo"] else options["torch_microbatches"]:
            for name in RIVALS:
                if possible(name, m, dist.get_world_size()):
                    rows += _in_turn([_Contender(name, m, milliseconds, _torchs, options)], options)
    return rows


def _contenders(milliseconds: float, m: int, options: dict[str, Any]) -> list[_Contender]:
    """Plain loops, and all methods."""
    found = [] if options["gloo"] else [_Contender(ALONE, m, milliseconds, _alone, options)]
    for method in options["methods"]:
        for refresh in (None, *(options["refresh"] if get_method(method).predicts_by_rule else ())):
            found.append(_Contender(method, m, milliseconds, _ours, {**options, "refresh": refresh}))
    return found


def _in_turn(contenders: list[_Contender], options: dict[str, Any]) -> list[dict[str, Any]]:
    """Their rows."""
    k, depth = dist.get_rank(), dist.get_world_size()
    slow = 1.0 + (options["uneven"] if k == depth // 2 else 0.0)
    timed = []
    for one in contenders:
        device = Device(one.milliseconds / 3000 * slow, options["jitter"], seed=k)
        warm_up = _warm_up(depth, options) if one.make is _ours else depth + 2
        timed.append(TimedSteps(one.make(device, one.name, one.m, one.options), device, warm_up))
    busy, seconds = timed_windows(timed, options["steps"], options["repeats"])
    samples = (busy / seconds).tolist()
    alone = median(samples[0]) if contenders[0].make is _alone else None
    return [one.row(found, alone) for one, found in zip(contenders, samples, strict=True)]


def _ideal(name: str, m: int, alone: float | None, options: dict[str, Any]) -> dict[str, Any]:
    """What the action program allows with the same draws, where that is known: to devices alone, and to the loops around them as well."""
    if m > 1 or not options["jitter"] or any(options[what] for what in ("uneven", "delay", "bandwidth")):
        return {}
    depth = dist.get_world_size()
    program = get_method(name).program(depth, m, None, False, read_slack(options["slack"]))
    windows = program, options["jitter"], _warm_up(depth, options), options["steps"], options["repeats"]
    found = {"ideal": median(ideal_windows(*windows))}
    if alone is not None:
        # Of plain loops, in units of a stage's mean time: what PyTorch does for a mini-batch outside the waits.
        own_work = (1 / alone - 1) * math.exp(options["jitter"] ** 2 / 2)
        found["ideal with own work"] = median(ideal_windows(*windows, own_work))
    return found


@dataclass(frozen=True)
class TimedSteps:
    """The mini-batches of one contender.

    Attributes:
        step: carries out one of them.
        device: that it waits for.
        warm_up: mini-batches before each window, until the pipeline is full.
    """

    step: Step
    device: Device
    warm_up: int


def timed_windows(contenders: Sequence[TimedSteps], steps: int, repeats: int) -> Tensor:
    """How long the busiest stage worked, and the slowest one took, in seconds: both for each contender and each of ``repeats`` windows of
    ``steps`` mini-batches, of shape (2, contenders, repeats).

    The contenders take turns, window by window: what else the machine does differs from one second to the next by more than they do.
    """
    spent = torch.zeros(2, len(contenders), repeats)
    for n in range(repeats):
        for which, one in enumerate(contenders):
            dist.barrier()
            # From here on nothing but the pipeline itself holds the stages together: after a barrier stage k waits for k forwards,
            # and over a slow link for its delay as well. That would be 12 % of a window of 40 mini-batches at D = 16.
            for _ in range(one.warm_up):
                one.step()
            one.device.busy, start = 0.0, time.perf_counter()
            for _ in range(steps):
                one.step()
            spent[0, which, n], spent[1, which, n] = one.device.busy, time.perf_counter() - start
    dist.all_reduce(spent, dist.ReduceOp.MAX)
    return spent


def _chosen(options: dict[str, Any], what: str) -> bool:
    return bool(read_slack(options[what]) if what == "slack" else options[what])


def _how(settings: dict[str, Any]) -> str:
    """Options of a method, as names of contenders tell them."""
    slack = f", slack {settings['slack']}" if "slack" in settings else ""
    return slack + (f", in_progress refresh={settings['refresh']}" if "refresh" in settings else "")


def _warm_up(depth: int, options: dict[str, Any]) -> int:
    """Steps until the pipeline is full."""
    return 2 + Program("async_1f1b", depth, slack=read_slack(options["slack"])).warm_up


def conditions(options: dict[str, Any]) -> str:
    """What is other than equal stages on fast links."""
    parts = [f"slow stage +{options['uneven']:.0%}"] if options["uneven"] else []
    parts += [f"jitter {options['jitter']:g}"] if options["jitter"] else []
    parts += [f"delay {options['delay'] * 1e3:g} ms"] if options["delay"] else []
    parts += [f"{options['bandwidth'] / 1e6:g} MB/s"] if options["bandwidth"] else []
    parts += ["through gloo"] if options["gloo"] else []
    return "".join(f", {part}" for part in parts)


def _ours(device: Device, name: str, m: int, options: dict[str, Any]) -> Step:
    k, depth = dist.get_rank(), dist.get_world_size()
    width, transport = options["width"], "group" if options["gloo"] else "auto"
    module = WaitingStage(device, width)
    place = PipelineStage(module, k, depth, torch.device("cpu"))
    pipe = Schedule(
        place,
        _adam(module),
        nn.functional.mse_loss,
        name,
        m,
        transport=transport,
        liveness_timeout=None,
        slack=options["slack"],
        compress=options.get("compress"),
        **({"prediction": "in_progress", "refresh": options["refresh"]} if options.get("refresh") else {}),
    )
    x = torch.ones(BATCH, width)
    args, target = ((x,) if k == 0 else ()), (x if k == depth - 1 else None)

    def step() -> None:
        pipe.step(*args, target=target)

    return step


def _alone(device: Device, _: str, m: int, options: dict[str, Any]) -> Step:
    k, depth, width = dist.get_rank(), dist.get_world_size(), options["width"]
    module = WaitingStage(device, width)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    x, y = torch.ones(BATCH, width), torch.ones(BATCH, width)

    def step() -> None:
        for given, target in zip(x.chunk(m), y.chunk(m), strict=True):
            output = module(given.detach().requires_grad_(k > 0))
            if k == depth - 1:
                (nn.functional.mse_loss(output, target) / m).backward()  # type: ignore[no-untyped-call]
            else:
                output.backward(target)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _torchs(device: Device, name: str, m: int, options: dict[str, Any]) -> Step:
    width = options["width"]
    part = 1 / len(TORCH[name](dist.get_rank(), dist.get_world_size()))
    x = torch.ones(BATCH, width)
    return rival_step(name, lambda *_: WaitingStage(device, width, part), m, nn.functional.mse_loss, _adam, x, x)


def _adam(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-4)


def columns(record: Record) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: a line per contender and condition."""
    head = ["stages", "ms per stage", "conditions", "contender", "M", "efficiency", "lowest .. highest"]
    body = []
    for row in record.rows:
        s = row.settings
        told = conditions({"uneven": 0, "jitter": 0, "delay": 0, "bandwidth": 0, "gloo": False, **s})[2:] or "equal stages"
        contender = ("" if s["ours"] else "torch ") + s["method"] + _how(s)
        cells = [str(s["depth"]), f"{s['milliseconds']:g}", told, contender]
        body.append([*cells, str(s["microbatches"]), f"{row.median:.3f}", f"{min(row.samples):.3f} .. {max(row.samples):.3f}"])
    return head, body
