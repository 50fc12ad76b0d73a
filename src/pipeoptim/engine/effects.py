"""Options that could not take effect under the chosen method: refused, so that none is ignored in silence."""

from __future__ import annotations

from dataclasses import fields

from torch.optim import Optimizer

from pipeoptim.engine.stage.checks import check_delay_compensation
from pipeoptim.errors import ConfigError
from pipeoptim.methods import Method, PredictorContext, get_method, refresh_every
from pipeoptim.options import PipelineOptions, about
from pipeoptim.schedule import AUTO, Program, slack_at_first


def planned(options: PipelineOptions, depth: int, processes: int | None = None) -> tuple[Method, Program]:
    """What a pipeline with these options trains by.

    Raises:
        ConfigError: the method is not defined for them, or an option could not take effect.
    """
    method = get_method(options.method).starting_synchronously(options.synchronous_updates)
    program = method.program(depth, options.microbatches, processes, options.overlap, slack_at_first(options.slack))
    check_effects(options, method, program)
    if options.slack == AUTO:
        method.check_slack()
    return method, program


def check_optimizer(optimizer: Optimizer | None, method: Method, program: Program, prediction: str) -> None:
    """Raise ConfigError where a stage with ``optimizer`` could not train by ``method``: the checks that a stage itself makes."""
    if optimizer is None:
        return
    check_delay_compensation(optimizer, method)
    predicting = next((k for k in range(program.depth) if method.predicts_on(program, k)), None)
    stepped = method.compensated(optimizer)
    if predicting is not None and stepped is not None:
        method.make_predictor(PredictorContext(stepped, program, predicting, kind=prediction, fused=False))


def check_effects(options: PipelineOptions, method: Method, program: Program) -> None:
    """Raise ConfigError where ``method`` has no use for an option, or its ``program`` cannot do what an option asks for.

    Options that only are trivially satisfied are taken, since a script passes them whatever its size is: ``uneven`` and
    ``loss_weight`` at M = 1, clipping by the global norm of a single stage, ``recompute="forward"`` without checkpoints.
    """
    for entry in fields(PipelineOptions):
        known, value = about(entry), getattr(options, entry.name)
        if known.needs is not None and value not in (entry.default, *known.idle) and not known.needs.met_by(method):
            raise ConfigError(
                f"{entry.name} is {value!r}, but method {method.name!r} {known.needs.otherwise}; leave it out, or choose a method that "
                "does, for example 'pipeoptim'"
            )
    if options.scale != 1.0 and options.prediction == "none":
        raise ConfigError(
            f"scale is {options.scale!r}, but prediction is 'none', so that there is nothing to scale; leave one of them out"
        )
    refresh_every(options.prediction, options.refresh)  # refuses one that means nothing to this kind
    if options.clip is not None:
        options.clip.check(program)
