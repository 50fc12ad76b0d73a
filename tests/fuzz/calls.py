"""Calls of everything that ``pipeoptim`` exports, with arguments drawn by its signatures: some fit, some are odd."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage

import pipeoptim as po
from pipeoptim.engine.stage.recompute import KINDS as RECOMPUTE_KINDS
from pipeoptim.partitioning import BlockCost
from pipeoptim.rules import KINDS
from pipeoptim.weights import Latest, Predicted, Stashed

ODD: list[Callable[[], Any]] = [
    *(
        lambda value=value: value
        for value in (None, True, 0, -1, 3, 2.5, -0.0, 1e300, 10**9, 10**400, 1e-320, 10**30, float("nan"), float("inf"), 1j)
    ),
    *(
        lambda value=value: value
        for value in ("", "x", "ü∆", "1", "a\nb", "x" * 2000, b"x", (), (1, 2), range(3), range(10**12), object(), len, int)
    ),
    *(
        list,
        dict,
        set,
        object,
        lambda: [None],
        lambda: [3, "a"],
        lambda: {"a": 1},
        lambda: {1: None},
        lambda: [[(0, "weight")]],
    ),
    *(lambda: torch.ones(2), lambda: torch.tensor(1.0), lambda: torch.float16, lambda: numpy.ones(2), lambda: numpy.int64(2)),
    *(
        lambda: nn.Linear(2, 2),
        lambda: [nn.Linear(2, 2)],
        lambda: nn.Linear,
        lambda: lambda *_, **__: 1.0,
        lambda: Path("absent"),
    ),
    lambda: torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1),
]
"""Makers of what hardly ever fits."""


@dataclass
class Scene:
    """What one call may refer to.

    Args:
        folder: empty.
        saved: with a sharded checkpoint, weights and a trace.
        rng: where chance comes from.
    """

    folder: Path
    saved: Path
    rng: random.Random
    stages: list[nn.Linear] = field(default_factory=lambda: [nn.Linear(4, 4), nn.Linear(4, 4)])

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """One per stage."""
        return [torch.optim.SGD(stage.parameters(), lr=0.1, momentum=0.9) for stage in self.stages]

    def pipe(self, **options: Any) -> po.Emulator:
        """A pipeline of the stages."""
        return po.Emulator(self.stages, self.optimizers, nn.functional.mse_loss, **options)

    def process_stage(self) -> PipelineStage:
        """The first stage as the only one of a pipeline of one process."""
        return PipelineStage(self.stages[0], 0, 1, torch.device("cpu"))

    def weights(self) -> list[torch.Tensor]:
        """A copy."""
        return [p.detach().clone() for stage in self.stages for p in stage.parameters()]


def step_scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """Halves the rate at every update."""
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)


def own_method(name: str = "mine") -> po.Method:
    """As PipeDream."""
    return po.Method(name, order="async_1f1b", forward=Latest(), backward=Stashed(), summary="mine")


FITTING: dict[str, Callable[[Scene], list[Any]]] = {
    "InterleavedSchedule.stages": lambda s: [[s.process_stage()] * 2],
    "register_rule.optimizers": lambda _: [type("Own", (torch.optim.SGD,), {})],
    "CombinedOptimizer.optimizers": lambda s: s.optimizers,
    "load_sharded.folder": lambda s: [s.saved / "sharded", str(s.saved / "sharded"), s.saved / "weights"],
    "Checkpointer.every": lambda _: [1, 3],
    "merge_trace.folder": lambda s: [s.saved / "trace", s.saved],
    "register_method.method": lambda _: [own_method(), po.get_method("naive")],
    "save_sharded.names": lambda _: [None, [{"weight": "weight", "bias": "bias"}] * 2],
    "load_weights.names": lambda _: [None, {"0.weight": "weight", "0.bias": "bias"}],
    "Partition.stages": lambda s: [s.stages],
    "Partition.tied": lambda _: [[]],
    "Partition.replicas": lambda _: [[], [1, 1]],
    "Method.optimizer": lambda _: [None],
    "collect_losses.strict": lambda _: [True, False],
    "Schedule.compress": lambda _: [None],
    "MicroBatches.value": lambda _: [[torch.ones(2, 4)] * 2],
    "partition.num_stages": lambda _: [2, 1],
    "add_loss.name": lambda _: ["part"],
    "add_loss.value": lambda _: [torch.tensor(1.0, requires_grad=True)],
    "activations": lambda _: [None, "bf16", "int8"],
    "at_least_depth_microbatches": lambda _: [False, True],
    "autocast": lambda _: [None, torch.bfloat16],
    "background": lambda _: [False, True],
    "backward": lambda _: [Latest(), Stashed(), Predicted()],
    "bandwidth": lambda _: [None, 1e9],
    "batches": lambda _: [1],
    "best_scale": lambda _: [None, 1.0],
    "beta": lambda _: [0.98, 0.0],
    "lambda_abs": lambda _: [1.0],
    "lambda_rel": lambda _: [1.05],
    "outlier": lambda _: [None, 10.0],
    "audit": lambda _: [None, 2],
    "warmup": lambda _: [0, 100],
    "betas": lambda _: [(0.9, 0.999)],
    "clip": lambda _: [
        None,
        1.0,
        po.Clip(1.0),
        po.Clip(1.0, "global"),
        po.Clip(1.0, "global_delayed"),
        "adagc",
        po.AdaGC(warmup=1),
    ],
    "compress": lambda _: [None, "bf16", "int8", po.Compression("bf16", "int8", "gradients")],
    "cosine": lambda _: [None, 1.0],
    "costs": lambda _: [None, [BlockCost(str(n), 1.0, 1.0, 64, 64, 80) for n in range(2)]],
    "deviations": lambda _: ["", "none"],
    "device": lambda _: [None, "cpu", torch.device("cpu")],
    "devices": lambda _: [None, 2],
    "dim": lambda _: [0, 1, -1],
    "error_feedback": lambda _: ["none", "gradients", "activations", "both"],
    "folder": lambda s: [s.folder / "new", str(s.folder / "new"), s.saved, s.folder / "deep" / "er"],
    "forward": lambda _: [Latest(), Predicted()],
    "gradients": lambda _: [None, "bf16", "int8"],
    "group": lambda _: [None],
    "how": lambda _: ["auto", "blocks", "layers", "trace"],
    "kind": lambda _: list(KINDS),
    "layers": lambda _: [None],
    "lengths": lambda _: [[1, 1]],
    "liveness_timeout": lambda _: [None, 5.0],
    "loss": lambda _: [0.5],
    "loss_fn": lambda _: [nn.functional.mse_loss],
    "loss_weight": lambda _: [None, lambda target: target.numel()],
    "lr": lambda _: [0.001, 1.0],
    "lr_scale": lambda _: [None, lambda program, k, version: 0.5],
    "max_norm": lambda _: [1.0, 3],
    "memory": lambda _: [None, [2**30, 2**30]],
    "memory_bytes": lambda _: [[80, 80]],
    "method": lambda _: [*po.METHODS, own_method("other")],
    "microbatches": lambda _: [1, 2, 4],
    "model": lambda s: [nn.Sequential(*s.stages), s.stages],
    "module": lambda s: [nn.Sequential(*s.stages), s.stages[0]],
    "momentum": lambda _: [0.95, 0.0],
    "monitor": lambda _: [False, True, 2],
    "muon_lr": lambda _: [None, 0.02],
    "name": lambda _: ["mine"],
    "names": lambda _: [None],
    "on_update": lambda _: [None, lambda k, version: None],
    "optimizer": lambda s: [s.optimizers[0]],
    "optimizers": lambda s: [s.optimizers, lambda p: torch.optim.Adam(p)],
    "order": lambda _: ["async_1f1b", "gpipe", "1f1b"],
    "overlap": lambda _: [False, True],
    "parameters": lambda s: [list(s.stages[0].parameters())],
    "parts": lambda _: [{}],
    "pins": lambda _: [(), [1]],
    "pipe": lambda s: [s.pipe()],
    "prediction": lambda _: list(KINDS),
    "predictor": lambda _: [None],
    "processes": lambda _: [None, 1, 2],
    "recompute": lambda _: list(RECOMPUTE_KINDS),
    "relative_error": lambda _: [None, 0.5],
    "replicas": lambda _: [None],
    "sample_args": lambda _: [(torch.ones(4, 4),)],
    "sample_kwargs": lambda _: [None, {}],
    "scale": lambda _: [1.0, 0.5, "auto"],
    "scaler": lambda _: [None],
    "scheduler": lambda _: [None],
    "schedulers": lambda _: [None, step_scheduler],
    "scope": lambda _: ["stage", "global", "global_delayed"],
    "seconds": lambda _: [[1.0, 1.0]],
    "seed": lambda _: [None, 0, 2**40],
    "skip": lambda _: [0, 2],
    "source": lambda s: [s.saved / "weights"],
    "speeds": lambda _: [None, [1, 2]],
    "stage": lambda s: [s.process_stage()],
    "stages": lambda s: [s.stages, nn.Sequential(*s.stages)],
    "steps": lambda _: [0, 1, 3],
    "summary": lambda _: ["mine"],
    "synchronous_updates": lambda _: [0, 2],
    "tied": lambda _: [None, [[(0, "weight"), (1, "weight")]]],
    "timeout": lambda _: [5.0, 10],
    "trace": lambda _: [None, po.Trace()],
    "transport": lambda _: ["auto", "group"],
    "uneven": lambda _: [False, True],
    "value": lambda _: [torch.ones(4, 4), [torch.ones(2, 4)] * 2],
    "version": lambda _: [1],
    "weight": lambda _: [1.0],
    "weight_decay": lambda _: [0.0, 0.01],
    "worse": lambda _: [False],
}
"""What fits a parameter of that name, or of that name of one callable. Parameters with a default need no entry."""


def exported() -> dict[str, Callable[..., Any]]:
    """Everything in ``pipeoptim.__all__`` that is called; errors are raised instead."""
    found = {name: getattr(po, name) for name in po.__all__}
    errors = {name for name, value in found.items() if isinstance(value, type) and issubclass(value, BaseException)}
    return {name: value for name, value in found.items() if callable(value) and name not in errors}


@dataclass
class Call:
    """A call to be made."""

    name: str
    args: list[Any] = field(default_factory=list)
    kwargs: dict[str, Any] = field(default_factory=dict)

    def make(self) -> Any:
        """What it returns."""
        return getattr(po, self.name)(*self.args, **self.kwargs)

    def __str__(self) -> str:
        given = [_short(value) for value in self.args] + [f"{name}={_short(value)}" for name, value in self.kwargs.items()]
        return f"po.{self.name}({', '.join(given)})"


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) < 100 else f"<{type(value).__name__}>"


def odd_value(parameter: inspect.Parameter, rng: random.Random) -> Any:
    """Something that hardly ever fits; no function that fails, where a function is wanted: its errors are the user's own."""
    wants_function = any(word in str(parameter.annotation) for word in ("Callable", "Fn", "Maker", "Hook", "LossWeight"))
    value = rng.choice(ODD)()
    while wants_function and callable(value) and getattr(value, "__name__", "") != "<lambda>":
        value = rng.choice(ODD)()
    return value


def draw(name: str, scene: Scene) -> Call:
    """A call of ``pipeoptim.<name>``: most often one of its arguments is odd, or some, or none."""
    rng = scene.rng
    parameters = [p for p in inspect.signature(getattr(po, name)).parameters.values() if p.kind is not p.VAR_KEYWORD]
    odd = {p.name for p in rng.sample(parameters, min(len(parameters), rng.choice((0, 1, 1, 1, 2, 3))))}
    optional = {p.name for p in parameters if p.default is not p.empty}
    chosen = set(rng.sample(sorted(optional), min(len(optional), rng.choice((0, 0, 1, 2, 4)))))
    call = Call(name)
    for parameter in parameters:
        fits = parameter.name not in odd
        if parameter.kind is parameter.VAR_POSITIONAL:
            several = range(rng.randrange(3))
            call.args += fitting(name, parameter, scene) if fits else [odd_value(parameter, rng) for _ in several]
        elif not fits:
            call.kwargs[parameter.name] = odd_value(parameter, rng)
        elif parameter.name not in optional or parameter.name in chosen:
            call.kwargs[parameter.name] = rng.choice(fitting(name, parameter, scene))
    return call


def fitting(name: str, parameter: inspect.Parameter, scene: Scene) -> list[Any]:
    """Values that fit, at least one."""
    makers = FITTING.get(f"{name}.{parameter.name}") or FITTING.get(parameter.name)
    if makers is None:
        assert parameter.default is not parameter.empty, f"FITTING has no value for {parameter.name} of po.{name}; add one"
        return [parameter.default]
    return makers(scene)
