"""Options that could not take effect under the chosen method: refused, so that none is ignored in silence."""

from __future__ import annotations

from pipeoptim.errors import ConfigError
from pipeoptim.methods import Method
from pipeoptim.options import DEFAULTS, PipelineOptions
from pipeoptim.schedule import Program


def check_effects(options: PipelineOptions, method: Method, program: Program) -> None:
    """Raise ConfigError where ``method`` has no use for an option, or its ``program`` cannot do what an option asks for.

    Options that only are trivially satisfied are taken, since a script passes them whatever its size is: ``uneven`` and
    ``loss_weight`` at M = 1, clipping by the global norm of a single stage, ``recompute="forward"`` without checkpoints.
    """
    if options.prediction not in (DEFAULTS.prediction, "none") and not method.predicts:
        raise ConfigError(
            f"prediction is {options.prediction!r}, but method {method.name!r} predicts no weights; leave it out, or choose a method that "
            "does, for example 'pipeoptim'"
        )
    if options.monitor and not method.forward.predicts:
        raise ConfigError(
            f"monitor is {options.monitor!r}, but method {method.name!r} predicts no weights of a forward, so there is nothing to measure; "
            "leave it out, or choose a method that does, for example 'pipeoptim'"
        )
    if options.clip is not None:
        options.clip.check(program)
