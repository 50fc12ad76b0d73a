"""What a method is: an order of work, weights for the forward, weights for the backward, and where it was published."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch.optim import Optimizer

from pipeoptim.errors import ConfigError
from pipeoptim.methods.predictor_context import PredictorContext
from pipeoptim.optim import DelayCompensation
from pipeoptim.rules import CombinedOptimizer
from pipeoptim.rules.combined import members
from pipeoptim.schedule import ORDERS, Program, Slack, describe_slack
from pipeoptim.weights.sources import Source
from pipeoptim.weights.store import WeightPredictor


@dataclass(frozen=True)
class OwnOptimizer:
    """The optimizer that belongs to a method: what ``pipeoptim train`` and ``compare`` use with it unless told otherwise.

    Args:
        name: a class of ``torch.optim``.
        options: its arguments besides lr, for stage ``k`` of ``depth``.
    """

    name: str
    options: Callable[[int, int], Mapping[str, Any]]


@dataclass(frozen=True)
class Method:
    """A way to train through a pipeline, as a frozen table that the engines carry out.

    Args:
        name: what users type.
        order: a key of :data:`pipeoptim.schedule.ORDERS`.
        forward, backward: where the weights of F and B come from.
        summary: one line for tables.
        at_least_depth_microbatches: whether it is defined only where M is at least the number of micro-batches that stage 0 has in
            flight, which is D without slack.
        predictor: ``predictor(context)`` makes what predicts the weights of a stage, from a :class:`PredictorContext`; by default
            the update rule of the stage's optimizer does.
        lr_scale: factor on the learning rate of an update: ``lr_scale(program, k, t)``, t counting updates from the end of the
            synchronous start; None for 1.
        synchronous_updates: how many updates at the start of training run synchronously: with a drain after each, on the latest weights,
            and without compensation and ``lr_scale``. They are those of ``1f1b``, bit for bit.
        compensation: ``compensation(optimizer)`` makes what corrects the steps of the stage's optimizer for its version gap, usually a
            class of :mod:`pipeoptim.optim`; by default nothing does.
        optimizer: the optimizer that belongs to the method, if one does.
        source: where it was published.
        deviations: where this implementation differs from the source, and why.

    Raises:
        ConfigError: the parts do not fit together.

    Example:
        >>> from pipeoptim.weights import Latest, Stashed
        >>> Method("mine", order="async_1f1b", forward=Latest(), backward=Stashed(), summary="as PipeDream").name
        'mine'
    """

    name: str
    order: str
    forward: Source
    backward: Source
    summary: str
    at_least_depth_microbatches: bool = False
    predictor: Callable[[PredictorContext], WeightPredictor] | None = None
    lr_scale: Callable[[Program, int, int], float] | None = None
    synchronous_updates: int = 0
    optimizer: OwnOptimizer | None = None
    compensation: Callable[[Optimizer], DelayCompensation] | None = None
    source: str = ""
    deviations: str = ""

    def __post_init__(self) -> None:
        self._check_types()
        if self.order not in ORDERS:
            raise ConfigError(f"method {self.name!r} has order {self.order!r}; known orders: {', '.join(ORDERS)}")
        if self.forward.reuses_forward:
            raise ConfigError(f"method {self.name!r} has a stashed forward; only a backward can use the forward's weights")

    def _check_types(self) -> None:
        for field in ("name", "order", "summary", "source", "deviations"):
            if not isinstance(getattr(self, field), str):
                raise ConfigError(f"{field} of a method is {getattr(self, field)!r}, must be text")
        for field in ("forward", "backward"):
            if not isinstance(getattr(self, field), Source):
                raise ConfigError(
                    f"{field} of method {self.name!r} is {getattr(self, field)!r}, must say where the weights come from: a "
                    "pipeoptim.weights.Source, for example Latest()"
                )
        for field in ("predictor", "lr_scale", "compensation"):
            if getattr(self, field) is not None and not callable(getattr(self, field)):
                raise ConfigError(f"{field} of method {self.name!r} is {getattr(self, field)!r}, must be a function, or None")
        if self.optimizer is not None and not isinstance(self.optimizer, OwnOptimizer):
            raise ConfigError(f"optimizer of method {self.name!r} is {self.optimizer!r}, must be an OwnOptimizer, or None")
        if not isinstance(self.at_least_depth_microbatches, bool):
            raise ConfigError(
                f"at_least_depth_microbatches of method {self.name!r} is {self.at_least_depth_microbatches!r}, must be True or False"
            )
        if type(self.synchronous_updates) is not int or self.synchronous_updates < 0:
            raise ConfigError(
                f"synchronous_updates of method {self.name!r} is {self.synchronous_updates!r}, must be an integer of at least 0"
            )

    def compensated(self, optimizer: Optimizer | None) -> Optimizer | None:
        """What steps a stage in place of ``optimizer``: each of its members with the method's compensation, if there is one."""
        if self.compensation is None or optimizer is None:
            return optimizer
        found = [self.compensation(member) for member in members(optimizer)]
        return CombinedOptimizer(*found) if isinstance(optimizer, CombinedOptimizer) else found[0]

    def starting_synchronously(self, updates: int) -> Method:
        """This method with its first ``updates`` updates synchronous; as it is for 0.

        Raises:
            ConfigError: it says itself how many there are.
        """
        if not updates:
            return self
        if self.synchronous_updates:
            raise ConfigError(
                f"synchronous_updates is {updates}, but method {self.name!r} has {self.synchronous_updates} of its own; give it once"
            )
        return replace(self, synchronous_updates=updates)

    @property
    def predicts(self) -> bool:
        """Whether any of its weights are predicted."""
        return self.forward.predicts or self.backward.predicts

    @property
    def predicts_by_rule(self) -> bool:
        """Whether its predictions are those of the user's optimizer, as that steps."""
        return self.predicts and self.predictor is None and self.compensation is None

    def make_predictor(self, context: PredictorContext) -> WeightPredictor:
        """What predicts the weights of one stage: the method's own predictor, else the rule of the stage's optimizer."""
        return self.predictor(context) if self.predictor is not None else context.rule_predictor()

    def program(
        self, depth: int, microbatches: int, processes: int | None = None, overlap: bool = False, slack: Slack = 0.0
    ) -> Program:
        """The action program for a pipeline of ``depth`` stages.

        Args:
            depth, microbatches: D and M.
            processes: over which the stages are dealt in turn, where that is fewer than ``depth``: the method's order interleaved.
            overlap: each U behind the next F of its stage.
            slack: more micro-batches in flight, see :class:`~pipeoptim.schedule.Program`.

        Raises:
            ConfigError: the method is not defined for this number of micro-batches, or only for its own order.
        """
        if processes is not None and not isinstance(processes, int):
            raise ConfigError(
                f"processes is a {type(processes).__name__}, must be an integer that divides the depth of {depth}"
            )
        interleaved = processes is not None and processes != depth
        if (interleaved or overlap) and not (self.forward.any_order and self.backward.any_order):
            raise ConfigError(
                f"method {self.name!r} says by a formula for its own order how old weights are; without interleaving and overlap it "
                "works, and methods that count do with both, for example 'pipeoptim'"
            )
        if slack:
            self.check_slack()
        # Orders that do not interleave keep their name here: `Program` refuses them with its own message.
        order = (interleaved and ORDERS[self.order].interleaved_as) or self.order
        program = Program(order, depth, microbatches, processes if interleaved else None, overlap, slack)
        if self.at_least_depth_microbatches and microbatches < (least := program.in_flight(0)):
            wanted = f"in flight on stage 0, {least} with slack {describe_slack(program.slack)}" if program.slack else "stages"
            raise ConfigError(
                f"method {self.name!r} needs at least as many micro-batches as {wanted}: microbatches is "
                f"{microbatches}, depth is {depth}; set microbatches to {least} or more"
            )
        return program

    def check_slack(self) -> None:
        """Raises ConfigError where its weights are right for the depth alone."""
        if not (self.forward.any_slack and self.backward.any_slack):
            raise ConfigError(
                f"method {self.name!r} says by a formula for the depth alone how old weights are, which slack makes older; leave slack "
                "out, or choose a method that counts, for example 'pipeoptim'"
            )

    def predicts_on(self, program: Program, k: int) -> bool:
        """Whether stage ``k`` ever predicts (the last stage of ``pipeoptim`` does not: its gap is 0)."""
        span = range((program.warm_up + 1) * program.microbatches)  # the warm-up, and one mini-batch of the steady state
        return any(source.steps_ahead(program, k, i) > 0 for source in (self.forward, self.backward) for i in span)
