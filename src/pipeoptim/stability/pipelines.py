"""The stages of a method as linear models: where F and B get their weights from, read from the method's own table."""

from __future__ import annotations

from pipeoptim.errors import ConfigError
from pipeoptim.methods import Method
from pipeoptim.schedule import ActionKind, Program
from pipeoptim.stability.linear_stage import LinearStage, OfMicrobatch
from pipeoptim.stability.optimizers import LinearOptimizer
from pipeoptim.weights import Latest, Numbered, Predicted


def linear_stages(
    method: Method, program: Program, optimizer: LinearOptimizer, prediction: str = "refined", discrepancy: float = 0.0
) -> list[LinearStage]:
    """Every stage of a pipeline that trains by ``method``.

    Args:
        method, program: as the engines carry them out.
        optimizer: of all stages.
        prediction: kind, where the method predicts.
        discrepancy: see :class:`LinearStage`; of no effect where B runs on the weights of F.

    Raises:
        ConfigError: the method has parts that are not linear in this sense, or that are not known here.

    Example:
        >>> from pipeoptim.methods import get_method
        >>> from pipeoptim.stability.optimizers import linear_optimizer
        >>> method = get_method("pipeoptim")
        >>> [stage.prediction for stage in linear_stages(method, method.program(2, 1), linear_optimizer("sgd"))]
        ['refined', 'refined']
    """
    _check(method)
    kind = prediction if method.forward.predicts else "none"
    if method.backward.reuses_forward:
        discrepancy = 0.0
    return [
        LinearStage(program, k, optimizer, kind, _ahead(method, program, k), _age(method, program, k), discrepancy)
        for k in range(program.depth)
    ]


def _check(method: Method) -> None:
    unknown = [
        (method.predictor is not None, "it predicts by averages of its own"),
        (method.compensation is not None, "it corrects updates for the version gap"),
        (method.lr_scale is not None, "it changes the learning rate from update to update"),
        (not isinstance(method.forward, (Latest, Predicted, Numbered)), "its forward has a source of weights of its own"),
        (not (method.backward.reuses_forward or isinstance(method.backward, Latest)), "its backward uses other weights still"),
    ]
    for applies, reason in unknown:
        if applies:
            raise ConfigError(
                f"the stability of method {method.name!r} is not known: {reason}; known are methods that use the latest, older, stashed or "
                "predicted weights, for example pipeoptim, pipeoptim_stash, pipedream, pipedream_2bw and naive"
            )


def _ahead(method: Method, program: Program, k: int) -> OfMicrobatch:
    return lambda i: method.forward.steps_ahead(program, k, i)


def _age(method: Method, program: Program, k: int) -> OfMicrobatch | None:
    """Versions between the weights that F asks for by their number and the latest."""
    source = method.forward
    if not isinstance(source, Numbered):
        return None
    updates, at_forward = 0, {}
    for action in program.full(k, minibatches=2 * program.warm_up + 4):
        if action.kind is ActionKind.F:
            at_forward[action.number] = updates
        updates += action.kind is ActionKind.U
    return lambda i: at_forward[i] - source.number(program, k, i)
