"""Is this run possible? Checked before any work, in the order in which a user would want to hear it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pipeoptim.config import ENGINES, TrainConfig
from pipeoptim.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from pipeoptim.schedule import Program

RECOMPUTATIONS = ("backward", "forward")
PREDICTIONS = ("refined", "paper", "decayed", "displacement")

_AT_LEAST = {
    "stages": 1,
    "microbatches": 1,
    "chunks": 1,
    "replicas": 1,
    "batch_size": 1,
    "steps": 0,
    "epochs": 0,
    "seed": 0,
    "eval_every": 0,
    "eval_batches": 1,
    "checkpoint_every": 0,
    "keep_checkpoints": 1,
    "threads": 1,
    "monitor_every": 0,
    "trace_steps": 1,
}

#: What generators of random numbers take, and what a machine can be asked for.
_AT_MOST = {"seed": 2**32 - 1, "threads": 1024}


def check(config: TrainConfig) -> None:
    """Everything that can be told without building the model.

    Raises:
        ConfigError: one sentence with the value, the reason and the remedy.
    """
    for name, least in _AT_LEAST.items():
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name} is {value!r}, must be an integer of at least {least}")
        if value > _AT_MOST.get(name, value):
            raise ConfigError(f"{name} is {value}, must be at most {_AT_MOST[name]}")
    if not config.steps and not config.epochs:
        raise ConfigError("steps is 0, must be an integer of at least 1, or 0 where epochs says how long to train")
    if config.engine not in ENGINES:
        raise unknown_name("engine", config.engine, ENGINES)
    if config.prediction not in PREDICTIONS:
        raise unknown_name("prediction", config.prediction, PREDICTIONS)
    _check_layout(config)
    _check_microbatches(config)
    _check_lr(config)
    _check_method(config)
    _check_options(config)


def _check_layout(config: TrainConfig) -> None:
    stages, chunks = config.stages, config.chunks
    if stages % chunks:
        raise ConfigError(
            f"chunks is {chunks}, which does not divide the {stages} stages; every process has equally many stages"
        )
    if chunks > 1 and stages == chunks:
        raise ConfigError(f"chunks is {chunks}, which puts all {stages} stages on one process; set chunks to a smaller divisor")
    if config.replicas > 1 and config.engine != "processes":
        raise ConfigError(
            f"replicas is {config.replicas}, but engine is 'emulator', which trains one pipeline on the whole mini-batch; use engine "
            "'processes', or leave replicas out: both learn the same"
        )
    if config.recompute not in ("", *RECOMPUTATIONS):
        raise ConfigError(
            f"recompute is {config.recompute!r}, must be 'backward' or 'forward' (the weights that blocks run again on), or '' for none"
        )


def _check_microbatches(config: TrainConfig) -> None:
    size, replicas = config.batch_size, config.replicas
    parts = replicas if config.uneven else replicas * config.microbatches
    if size % parts:
        below, above = size - size % parts, size + parts - size % parts
        choice = f"{below} or {above}" if below else f"{above}"
        into = f"{config.microbatches} equal micro-batches" + (f" on each of {replicas} replicas" if replicas > 1 else "")
        into = f"equal parts for {replicas} replicas" if config.uneven else into
        remedy = "" if config.uneven else ", or use uneven"
        raise ConfigError(f"batch_size {size} cannot be split into {into}; set batch_size to {choice}{remedy}")


def program(config: TrainConfig) -> Program:
    """What the stages will do.

    Raises:
        ConfigError: the method cannot do it with so many stages, micro-batches, stages per process, or with overlap.
    """
    from pipeoptim.methods import get_method

    processes = config.stages // config.chunks if config.chunks > 1 else None
    return get_method(config.method).program(config.stages, config.microbatches, processes, config.overlap)


def _check_lr(config: TrainConfig) -> None:
    given = config.optimizer.options.get("lr")
    if given is None:
        return
    for lr in given.get("by_stage", [given]) if isinstance(given, dict) else [given]:
        if isinstance(lr, bool) or not isinstance(lr, int | float) or not math.isfinite(lr) or lr <= 0:
            raise ConfigError(f"lr is {lr!r}, must be a finite number above 0, for example 0.001")


def _check_method(config: TrainConfig) -> None:
    program(config)


def _check_options(config: TrainConfig) -> None:
    from pipeoptim.engine import Clip, Compression

    clip = config.clip
    if isinstance(clip, bool) or not isinstance(clip, int | float) or not math.isfinite(clip) or clip < 0:
        raise ConfigError(f"clip is {clip!r}, must be a finite number, for example 1.0, or 0 for no clipping")
    scope = Clip(clip or 1.0, config.clip_scope)  # a wrong one is said also while it has no effect
    if clip:
        scope.check(program(config))
    if config.autocast not in ("", "bfloat16"):
        raise ConfigError(f"autocast is {config.autocast!r}, must be 'bfloat16', or '' for none")
    if config.compress not in ("", "bf16", "int8"):
        raise ConfigError(f"compress is {config.compress!r}, must be 'bf16' or 'int8', or '' for none")
    Compression(config.compress or None, config.compress or None, config.error_feedback)
    if config.tensorboard:
        from pipeoptim.telemetry.tensorboard import check_installed

        check_installed()
