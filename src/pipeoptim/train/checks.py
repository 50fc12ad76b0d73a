"""Checks whether a run is possible, before any work starts, the most fundamental problems first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeoptim.config import SETTINGS, TrainConfig
from pipeoptim.errors import ConfigError
from pipeoptim.options import PipelineOptions, options_of_run
from pipeoptim.train.ramps import parts_of

if TYPE_CHECKING:
    from pipeoptim.schedule import Program


def check(config: TrainConfig) -> None:
    """Check everything that does not need the model to be built.

    Raises:
        ConfigError: one sentence with the value, the reason and the remedy.
    """
    check_settings(config)
    check_method(config)


def check_settings(config: TrainConfig) -> None:
    """The part of :func:`check` that is the same for all methods."""
    for name, known in SETTINGS.items():
        known.check(name, getattr(config, name))
    if not config.steps and not config.epochs:
        raise ConfigError("steps is 0, must be an integer of at least 1, or 0 where epochs says how long to train")
    _check_layout(config)
    if config.slack == "auto" and (config.engine != "processes" or config.replicas > 1):
        raise ConfigError(
            "slack is 'auto', which one pipeline of several processes measures; set engine to 'processes' and leave replicas out, or give "
            "the number that such a run chose"
        )
    if not config.checksums and config.engine == "emulator":
        raise ConfigError("checksums is False, but engine is 'emulator', which sends no messages; leave --no-checksums out")
    _check_survive(config)
    for part in parts_of(config):
        _check_microbatches(part)
    if config.batch_size_schedule and not config.steps:
        raise ConfigError("epochs cannot be counted where batch_size_schedule changes the size of mini-batches; set steps")
    if config.trace and len({part.microbatches for part in parts_of(config)}) > 1:
        raise ConfigError("a trace numbers micro-batches by their place in mini-batches of one size; leave trace out")
    _check_lr(config)
    if config.loggers or config.tensorboard:
        from pipeoptim.train.run_loggers import check_loggers

        check_loggers(config)
    if config.callbacks:
        from pipeoptim.train.callbacks import make_callbacks

        make_callbacks(config.callbacks)


def check_method(config: TrainConfig) -> None:
    """The part of :func:`check` that depends on the method: whether it is defined for the setting, and can do what the options ask for."""
    from pipeoptim.engine.effects import check_effects
    from pipeoptim.methods import get_method
    from pipeoptim.train.stage_rates import check_rates

    for part in parts_of(config):
        made = program(part)
        check_rates(part, made)
        options = PipelineOptions(part.method, part.microbatches, **options_of_run(part))
        check_effects(options, get_method(part.method), made)


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


def _check_survive(config: TrainConfig) -> None:
    """What the engine would refuse as well, and what concerns a run only."""
    settings = {
        "engine": (config.engine != "processes", "there is no process to replace; use --engine processes"),
        "threads": (config.threads > 1, "an image of a process has one thread; use --threads 1"),
        "chunks": (config.chunks > 1, "interleaved stages are not covered; use --chunks 1"),
        "replicas": (config.replicas > 1, "replicas are not covered; use --replicas 1"),
        "slack": (config.slack == "auto", "that measures links which survive replaces; give a number"),
        "export": (
            config.export,
            "weights are written by a process group, which an image has not; give --no-export, and when the run has ended: pipeoptim "
            "export RUN",
        ),
        "trace": (config.trace, "a trace would hold what was done twice; leave one of them out"),
        "loggers": (
            bool(config.loggers),
            "their threads and connections are not in an image of the process; leave one of them out",
        ),
        "checksums": (not config.checksums, "messages between processes of one machine carry none; leave --no-checksums out"),
        "tensorboard": (config.tensorboard, "its writer's thread is not in an image of the process; leave one of them out"),
    }
    for name, (refused, reason) in settings.items():
        if config.survive and refused:
            raise ConfigError(f"survive is {config.survive}, but {name} is {getattr(config, name)!r}: {reason}")


def _check_microbatches(config: TrainConfig) -> None:
    size, replicas = config.batch_size, config.replicas
    if config.microbatches * replicas > size and config.uneven:
        raise ConfigError(
            f"microbatches is {config.microbatches}, but with batch_size {size} each of {replicas} replicas has {size // replicas} rows of "
            "a mini-batch; set microbatches to at most that, or raise batch_size"
        )
    parts = replicas if config.uneven else replicas * config.microbatches
    if size % parts:
        below, above = size - size % parts, size + parts - size % parts
        choice = f"{below} or {above}" if below else f"{above}"
        into = f"{config.microbatches} equal micro-batches" + (f" on each of {replicas} replicas" if replicas > 1 else "")
        into = f"equal parts for {replicas} replicas" if config.uneven else into
        remedy = "" if config.uneven else ", or use uneven"
        raise ConfigError(f"batch_size {size} cannot be split into {into}; set batch_size to {choice}{remedy}")


def program(config: TrainConfig) -> Program:
    """The action program of the run.

    Raises:
        ConfigError: the method does not support this number of stages or micro-batches, interleaving, overlap or slack.
    """
    from pipeoptim.methods import get_method
    from pipeoptim.schedule import slack_at_first

    processes = config.stages // config.chunks if config.chunks > 1 else None
    return get_method(config.method).program(
        config.stages, config.microbatches, processes, config.overlap, slack_at_first(config.slack)
    )


def _check_lr(config: TrainConfig) -> None:
    from pipeoptim.train.parameter_groups import check_rate

    given = config.optimizer.options.get("lr")
    if given is None:
        return
    for lr in given.get("by_stage", [given]) if isinstance(given, dict) else [given]:
        check_rate("lr", lr)
