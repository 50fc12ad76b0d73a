"""A lower learning rate where gradients are older: that of stage k is divided by (1 + s_k)^p, s_k its version gap.

::

    stage      0      1      2      3        D = 4, M = 1, p = 1
    gap        3      2      1      0
    rate     lr/4   lr/3   lr/2    lr

A gradient that comes s updates late bears a step of about 1/(2s+1) of what one in time does (docs/theory.md). One rate for all stages is
that of the oldest gradients; here every stage has its own. PipeMare's T1 does so at first only. What it brings: docs/results.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pipeoptim.engine.stage.tied import Tied
from pipeoptim.errors import ConfigError, counted
from pipeoptim.methods import get_method
from pipeoptim.methods.facts import mean_gap

if TYPE_CHECKING:
    from torch import nn
    from torch.nn import Parameter

    from pipeoptim.config import TrainConfig
    from pipeoptim.schedule import Program
    from pipeoptim.train.optimizers import Factory


def stage_rates(config: TrainConfig, program: Program) -> list[float]:
    """(1 + s_k)^-p of each stage."""
    method = get_method(config.method)
    return [(1 + mean_gap(method, program, k)) ** -config.rate_by_gap for k in range(config.stages)]


def check_rates(config: TrainConfig, program: Program) -> None:
    """Whether ``rate_by_gap`` can take effect, and stays true to the gaps for the whole run.

    Raises:
        ConfigError: it cannot.
    """
    if not config.rate_by_gap:
        return
    reason = ""
    if config.slack == "auto":
        reason = "slack is 'auto', so that gaps are known only when the run has begun; give the number that such a run chose"
    elif config.microbatches_schedule:
        reason = "microbatches_schedule changes the gaps in mid-run, and learning rates do not follow; leave one of them out"
    elif set(stage_rates(config, program)) == {1.0}:
        reason = f"no gradient is old in method {config.method!r} with {counted(config.stages, 'stage')}; leave it out"
    if reason:
        raise ConfigError(f"rate_by_gap is {config.rate_by_gap}, but {reason}")


def with_stage_rates(config: TrainConfig, program: Program, make: Factory) -> Factory:
    """``make``, with the learning rates of each optimizer divided."""
    if not config.rate_by_gap:
        return make
    rates = stage_rates(config, program)

    def made(stage: nn.Module | Iterable[Parameter], k: int = 0, /) -> Optimizer:
        optimizer = make(stage, k)
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * rates[k]  # not in place: groups, and stages, may share one tensor
        return optimizer

    return made


def keeping_rates(config: TrainConfig, make: Callable[[Optimizer], LRScheduler]) -> Callable[[Optimizer], LRScheduler]:
    """``make``, checked: a scheduler that sets learning rates by itself would undo the division in silence."""
    if not config.rate_by_gap:
        return make

    def made(optimizer: Optimizer) -> LRScheduler:
        divided = [float(group["lr"]) for group in optimizer.param_groups]
        scheduler = make(optimizer)
        if divided != [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]:
            raise ConfigError(
                f"rate_by_gap is {config.rate_by_gap}, but lr_schedule {config.lr_schedule.target!r} sets the learning rates itself; use "
                "one that multiplies the optimizer's own, such as cosine, or leave rate_by_gap out"
            )
        return scheduler

    return made


def check_ties(config: TrainConfig, program: Program, ties: Sequence[Tied]) -> None:
    """Copies of one weight need one learning rate.

    Raises:
        ConfigError: they have several.
    """
    if config.rate_by_gap and ties:
        rates = stage_rates(config, program)
        for tie in ties:
            if len({rates[k] for k in tie.holders}) > 1:
                raise ConfigError(
                    f"rate_by_gap is {config.rate_by_gap}, but the weight {tie.names[0]!r} is on stages {list(tie.holders)}, whose "
                    "learning rates differ, so that its copies would diverge; leave rate_by_gap out, or untie the weights"
                )
