"""What a stage is made of fits together: its module, optimizer, method and layout; and what then moves its weights."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pipeoptim.engine.stage.gradient_so_far import InProgressPredictor
from pipeoptim.engine.stage.master_weights import module_parameter
from pipeoptim.engine.stage.reduction import Reduction
from pipeoptim.engine.stage.tied_weights import TieOnStage
from pipeoptim.errors import ConfigError
from pipeoptim.methods import Method
from pipeoptim.optim import DelayCompensation
from pipeoptim.options import PipelineOptions
from pipeoptim.options.checks import takes
from pipeoptim.rules import KINDS, Predictor
from pipeoptim.rules.combined import members
from pipeoptim.rules.lr import drives
from pipeoptim.schedule import Program
from pipeoptim.weights.store import WeightPredictor


def skip_step() -> None:
    """The step of an update that is skipped."""


def step_function(
    optimizer: Optimizer | None,
    method: Method,
    program: Program,
    predictor: WeightPredictor | None,
    reduction: Reduction,
    ties: Sequence[TieOnStage],
) -> Callable[[], object]:
    """What moves the weights of a stage.

    Where the other stages step and predict in one pass, the stage that predicts nothing steps by the same kernel: rounded alike,
    and it is the slowest stage (it has the loss as well), so that its step decides how fast the pipeline is. So do stages whose
    predictions wait for gradients of the next mini-batch.
    """
    if optimizer is None:
        return skip_step
    kernels = method.predictor is None and any(method.predicts_on(program, k) for k in range(program.depth))
    separate = predictor is None or isinstance(predictor, InProgressPredictor)
    if separate and kernels and kernel_choice(ties):
        with suppress(ConfigError):  # optimizers that no weights can be predicted for
            return Predictor(optimizer, kind="none", shards=reduction.shards).step
    return lambda: optimizer.step()  # as it is then: a scheduler may put a wrapper there


def kernel_choice(ties: Sequence[TieOnStage]) -> Literal["auto", False]:
    """Whether kernels may step: torch's own step everywhere keeps the copies of tied weights equal bit for bit."""
    return False if ties else "auto"


def check_optimizer(optimizer: Any, k: int) -> None:
    """Raises ConfigError for what is no optimizer."""
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        raise ConfigError(
            f"the optimizer of stage {k} is a {type(optimizer).__name__}, must be a torch.optim.Optimizer, or None for none"
        )


def check_loss_function(loss_fn: Any) -> None:
    """Raises ConfigError for what is no function of output and target."""
    if isinstance(loss_fn, type) and issubclass(loss_fn, nn.Module):
        raise ConfigError(f"loss_fn is the class {loss_fn.__name__}, must be an object of it: {loss_fn.__name__}()")
    if not callable(loss_fn) or not takes(loss_fn, 2):
        raise ConfigError(f"loss_fn is {loss_fn!r}, must be a function of output and target on the last stage")


def check_initialized(module: nn.Module, k: int) -> None:
    """Raise ConfigError for a lazy module that has not seen an input yet."""
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise ConfigError(
                f"{name!r} of stage {k} has no shape yet (a lazy module); run the model once on a mini-batch, and make the optimizers "
                "after that"
            )


def optimizer_parameters(
    module: nn.Module, optimizer: Optimizer | None, scheduler: LRScheduler | None, k: int
) -> tuple[list[Tensor], list[Tensor]]:
    """What ``optimizer`` holds, and the module's parameters that it moves (other ones for masters), after checks."""
    check_initialized(module, k)
    if optimizer is None:
        if any(p.requires_grad for p in module.parameters()):
            raise ConfigError(f"stage {k} has parameters to train but no optimizer; make one from stage.parameters()")
        if scheduler is not None:
            raise ConfigError(f"stage {k} has a scheduler but no optimizer whose learning rate it could set; leave it out")
        return [], []
    check_optimizer(optimizer, k)
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigError("LBFGS calls the model again inside its step, which a pipeline cannot do; use another optimizer")
    if scheduler is not None:
        check_scheduler(scheduler, optimizer, k)
    own = {id(p) for p in module.parameters()}
    # In the order of the groups, which is also the order of state_dict(): everything per parameter is kept in it.
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    params = [module_parameter(p) for p in parameters]
    foreign = [tuple(p.shape) for p in params if id(p) not in own]
    if foreign:
        raise ConfigError(
            f"the optimizer of stage {k} holds {len(foreign)} parameters that are not in the stage's module "
            f"(first shape {foreign[0]}), as one over the whole model does; make one optimizer per stage, from stage.parameters()"
        )
    forgotten = {id(p) for p in module.parameters() if p.requires_grad} - {id(p) for p in params}
    if forgotten and not params:
        raise ConfigError(f"the optimizer of stage {k} holds none of its parameters")
    return parameters, params


def check_scheduler(scheduler: LRScheduler, optimizer: Optimizer, k: int) -> None:
    """Raise ConfigError where ``scheduler`` cannot be stepped once per update of ``optimizer``."""
    step = getattr(scheduler, "step", None)
    if not callable(step):
        raise ConfigError(
            f"the scheduler of stage {k} is a {type(scheduler).__name__}, must have a step(), as those of torch.optim do"
        )
    if hasattr(scheduler, "optimizer") and not drives(scheduler, optimizer):
        raise ConfigError(f"the scheduler of stage {k} belongs to another optimizer; make it from this stage's optimizer")
    wants = _needs_metric(scheduler)
    if wants is not None:
        raise ConfigError(
            f"the scheduler of stage {k} is a {type(wants).__name__}, whose step needs a metric that no update has; leave it out, and step "
            "it yourself between mini-batches, for each stage: scheduler.step(pipe.evaluate(batches).loss)"
        )


def _needs_metric(scheduler: Any) -> Any:
    """``scheduler``, or the one of those that it steps, whose step cannot be called without an argument."""
    try:
        inspect.signature(scheduler.step).bind()
    except TypeError:
        return scheduler
    except ValueError:  # no signature to look at
        return None
    # SequentialLR and ChainedScheduler step their members themselves, and pass no metric on.
    inner = getattr(scheduler, "_schedulers", ())
    return next(filter(None, map(_needs_metric, inner)), None) if isinstance(inner, (list, tuple)) else None


def check_groups(optimizer: Optimizer, count: int, k: int) -> None:
    """Raise ConfigError where ``optimizer`` holds another number of parameters than ``count``, which the stage knows."""
    # Read from the groups at every mini-batch, since add_param_group() tells nobody.
    held = sum([len(group["params"]) for group in optimizer.param_groups])
    if held != count:
        raise ConfigError(
            f"the optimizer of stage {k} holds {held} parameters, but {count} when the pipeline was made (add_param_group?); give it the "
            "frozen ones from the start and unfreeze them with requires_grad_(True), or drain() and make a new pipeline of the same stages "
            "and optimizers"
        )


def check_still_held(module: nn.Module, optimizer: Optimizer, k: int) -> None:
    """Raise ConfigError where ``optimizer`` moves a parameter that is not in ``module`` any more."""
    own = {id(p) for p in module.parameters()}
    lost = [tuple(p.shape) for group in optimizer.param_groups for p in group["params"] if id(module_parameter(p)) not in own]
    if lost:
        raise ConfigError(
            f"the optimizer of stage {k} moves {len(lost)} parameters that are not in the stage's module any more (first shape "
            f"{lost[0]}; load_state_dict(assign=True), a parametrization, another nn.Parameter?); write into parameters in place, with "
            "copy_() under no_grad(), or make a new pipeline with a new optimizer"
        )


def check_delay_compensation(optimizer: Optimizer | None, method: Method) -> None:
    """Raises ConfigError where an optimizer that the user made correct for delay meets predictions that deal with it already.

    Under a flushing method it finds a gap of 0 and corrects nothing, so that the same script has its synchronous baseline.
    """
    for member in () if optimizer is None else members(optimizer):
        if isinstance(member, DelayCompensation) and method.predicts and not member.follows_rule:
            own = type(member).__name__
            raise ConfigError(
                f"{own} compensates the delay by itself, and method {method.name!r} predicts weights for the same delay; pass the "
                f"optimizer without {own}, or choose a method that predicts nothing, for example 'pipedream_2bw'"
            )


def check_sharded(reduction: Reduction, method: Method, options: PipelineOptions, ties: Sequence[TieOnStage]) -> None:
    if not reduction.shards:
        return
    if options.on_bad == "skip":
        raise ConfigError(
            "on_bad is 'skip', but the stage's parameters are sharded, and a process looks at its shards of the gradients only; use "
            "replicas= without fully_shard, or on_bad='rollback'"
        )
    if ties:
        raise ConfigError(
            f"the weight {ties[0].tie} is tied, but the stage's parameters are sharded; use replicas= without fully_shard, or "
            "untie it in the model"
        )
    if KINDS[options.prediction].in_progress and method.predicts:
        raise ConfigError(
            f"prediction is {options.prediction!r}, but the stage's parameters are sharded, and a process gets its shard of the gradient "
            "with the mini-batch's last backward only; use replicas= without fully_shard, or another prediction"
        )
    if method.predictor is not None:
        raise ConfigError(
            f"method {method.name!r} keeps averages of whole gradients, but the stage's parameters are sharded; use replicas= "
            "without fully_shard, or a method that predicts by the optimizer's rule or not at all"
        )
    if options.scaler is not None and options.scaler.is_enabled():
        raise ConfigError(
            "a stage whose parameters are sharded cannot scale its loss, since each process would see the overflows of its own "
            "part only; use bfloat16, or replicas= without fully_shard"
        )


def check_audit(reduction: Reduction) -> None:
    """Raise ConfigError where updates cannot be done again on copies."""
    if reduction.shards:
        raise ConfigError(
            "audit does updates again on copies of whole weights, but the stage's parameters are sharded; leave it out, or use replicas= "
            "without fully_shard"
        )


def split_by_group(optimizer: Optimizer, params: list[Tensor]) -> list[list[Tensor]]:
    """``params`` cut as the optimizer's groups are."""
    rest = iter(params)
    return [[next(rest) for _ in group["params"]] for group in optimizer.param_groups]
