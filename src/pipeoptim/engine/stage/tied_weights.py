"""Weights that several stages use, such as an embedding that is also the output layer: one weight, a copy on each of its stages.

Each stage that uses a tied weight (a *holder*) has a copy of it with an optimizer state of its own, and computes the gradient of its
own use only. After B of mini-batch n every holder sends its gradient, and update n of every holder uses the sum over all
holders of their gradients of mini-batch n - d::

    B(n) of every holder --gradient--> exchange --sum of mini-batch n - d--> U(n) of every holder: the same step on equal copies


    d = 0 where the pipeline flushes, which is exact;
    d = :func:`~pipeoptim.schedule.common_delay` elsewhere, the smallest for which nobody waits: ceil(D/M) for first and last stage.

Updates 0 .. d-1 have no gradient for it (None, so that optimizers leave it alone). All holders begin with the same values, take
the same gradients in the same order and have the same optimizer settings, so their copies are equal bit for bit at equal versions.

Megatron-LM all-reduces the gradients of the embedding between first and last stage before each step, DeepSpeed those of its
``TiedLayerSpec``, both while the pipeline is empty. A pipeline that never flushes has no such moment; it pays with the delay d.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pipeoptim.engine.processes.exchange import GradientExchange
from pipeoptim.engine.stage.clipping import ClipRule
from pipeoptim.engine.stage.origin import find_origins
from pipeoptim.engine.stage.tied import Tied
from pipeoptim.errors import ConfigError
from pipeoptim.methods import Method
from pipeoptim.optim import DelayCompensation
from pipeoptim.rules.combined import members
from pipeoptim.schedule import Program, common_delay

TiedWeights = Sequence[Tied | Sequence[tuple[int, str]]]
"""What users give: entries of ``Partition.tied``, or plain lists of (stage, name) of each copy."""


def carried_ties(stages: Mapping[int, nn.Module], depth: int) -> list[Tied]:
    """The ties that ``stages`` of a pipeline carry since ``partition`` or ``untie`` made them, of the whole model.

    Raises:
        ConfigError: they were cut for another place, so that nobody can say where the other copies are.
    """
    found: dict[Tied, None] = {}
    for k, module in stages.items():
        for _, _, origin in find_origins(module):
            if origin.tied and (origin.k, origin.depth) != (k, depth):
                raise ConfigError(
                    f"stage {k} of {depth} was made as stage {origin.k} of {origin.depth}, where {origin.tied[0]} are one weight, "
                    "whose copies can be found in that order only; cut the model for this pipeline"
                )
            found |= dict.fromkeys(origin.tied)
    return list(found)


def read_tied(
    given: TiedWeights | None, carried: Sequence[Tied], program: Program, method: Method, clip: ClipRule | None, scaled: bool
) -> list[Tied]:
    """``given``, or else ``carried``, in one form, each tie's places in the order of the stages, after checks.

    Raises:
        ConfigError: places that do not exist, a carried tie that ``given`` contradicts, or a setting under which the copies would diverge.
    """
    ties = [_read_tie(tie, program.depth) for tie in (carried if given is None else given)]
    for tie in () if given is None else carried:
        if not any(_same_places(own, tie) for own in ties):
            raise ConfigError(
                f"tied says nothing of {tie}, which are one weight in the model that was cut; leave tied out, for the stages carry it, or "
                "untie them in the model before it is cut (tie_word_embeddings=False)"
            )
    seen: set[tuple[int, str]] = set()
    for tie in ties:
        if seen & set(tie.places):
            raise ConfigError(f"tied names {tie} twice; give one list with all places of that weight")
        seen |= set(tie.places)
    if ties:
        _check_ties(ties, program, method, clip, scaled)
    return ties


def _read_tie(tie: Tied | Sequence[tuple[int, str]], depth: int) -> Tied:
    places = tie.places if isinstance(tie, Tied) else tie
    try:
        # In the order of stages, for it is the order of summation on every engine.
        found = tuple(sorted((int(k), str(name)) for k, name in places))
    except (TypeError, ValueError):
        raise ConfigError(
            f"tied holds {tie!r}, must hold entries of a partition's tied, or lists of (stage, name of the parameter) of each copy: "
            '[[(0, "embed.weight"), (1, "head.weight")]]'
        ) from None
    stages = [k for k, _ in found]
    if len(set(stages)) < 2 or len(set(stages)) < len(stages) or not all(0 <= k < depth for k in stages):
        raise ConfigError(
            f"tied holds {list(found)}, must name two or more different stages of 0 .. {depth - 1}, one parameter on each; "
            "weights shared inside one stage are tied by themselves"
        )
    return Tied(tie.names if isinstance(tie, Tied) else tuple(name for _, name in found), found)


def _same_places(given: Tied, carried: Tied) -> bool:
    """Whether both name the same parameters; those of a wrapped stage may be given with the wrapper's prefix."""
    return given.holders == carried.holders and all(f".{name}".endswith(f".{carried.name_on(k)}") for k, name in given.places)


def _check_ties(ties: Sequence[Tied], program: Program, method: Method, clip: ClipRule | None, scaled: bool) -> None:
    if program.interleaved:
        raise ConfigError(
            f"weights tied across stages ({ties[0]}) are worked out for one stage per process; use one, or untie them in the model"
        )
    if clip is not None:
        clip.check_tied()
    if scaled:
        raise ConfigError(
            "loss scaling lets each stage skip updates by itself, so the copies of a tied weight would diverge; use bfloat16 "
            "without a scaler, or untie the weights"
        )
    for tie in ties:
        rates = [method.lr_scale(program, k, 0) if method.lr_scale else 1.0 for k in tie.holders]
        if len(set(rates)) > 1:
            raise ConfigError(
                f"method {method.name!r} scales the learning rates of stages {list(tie.holders)} by {rates}, so the copies of "
                f"the tied weight {tie.names[0]!r} would diverge; use another method, or untie the weights"
            )


class TiedWeight:
    """A holder's copy of a tied weight.

    Args:
        name, parameter: on this stage.
        optimized: what the optimizer moves: the parameter, or its master.
        exchange: with the other holders.
        delay: d.
        holders: the stages that have a copy; the first counts it in a norm over all stages.
        counted: whether that is this one.
    """

    def __init__(
        self,
        name: str,
        parameter: Tensor,
        optimized: Tensor,
        exchange: GradientExchange,
        delay: int,
        holders: tuple[int, ...],
        counted: bool,
    ) -> None:
        self.name, self.parameter, self.optimized = name, parameter, optimized
        self.exchange, self.delay, self.holders, self.counted = exchange, delay, holders, counted
        self._sent: deque[int] = deque()  # versions whose sum was not received yet
        self._sums: dict[int, Tensor] = {}  # version -> its sum

    @property
    def values(self) -> list[Tensor]:
        """What must start equal on all holders."""
        return [self.optimized] if self.optimized is self.parameter else [self.optimized, self.parameter]

    def check_program(self, program: Program) -> None:
        """Raises ConfigError where gradients would travel for another number of updates: those on their way were sent for this one."""
        delay = common_delay(program, self.holders)
        if delay != self.delay:
            raise ConfigError(
                f"the gradients of the tied weight {self.name!r} are {self.delay} updates old, and would be {delay} with "
                f"{program.microbatches} micro-batches; keep their number, untie the weights, or make a new pipeline"
            )

    def send_gradient(self, version: int) -> None:
        """Send this stage's own gradient of the update after ``version``; zeros if it has none."""
        # Handed over, not copied: the exchange sums into it. None until the sum arrives.
        gradient, self.optimized.grad = self.optimized.grad, None
        if gradient is None:
            # Every holder sends for every version; the others would wait for one that leaves out a turn.
            gradient = torch.zeros_like(self.optimized, requires_grad=False)
        if gradient.is_sparse:
            raise ConfigError(f"the tied weight {self.name!r} has a sparse gradient; make its Embedding with sparse=False")
        # Collectives want contiguous memory; a gradient that already is costs nothing here.
        self.exchange.send(version, gradient.contiguous())
        self._sent.append(version)

    def can_receive(self, version: int) -> bool:
        """Whether :meth:`receive_sum` would not wait for a stage that cannot act meanwhile (the emulator's stages take turns)."""
        due = version - self.delay
        return due not in self._sent or self.exchange.can_receive(due)

    def receive_sum(self, version: int) -> None:
        """Set the gradient of the update after ``version`` to the sum for version - d; None where there is none."""
        due = version - self.delay
        # In the order of sending, as every exchange requires; sums that are not due yet stay on their way.
        while self._sent and self._sent[0] <= due:
            self._receive_oldest()
        total = self._sums.pop(due, None)
        # Of a frozen weight it is zero, which an optimizer with weight decay would take for a gradient.
        self.optimized.grad = total if self.parameter.requires_grad else None

    def _receive_oldest(self) -> None:
        version = self._sent.popleft()
        self._sums[version] = self.exchange.receive(version)

    def abandon(self) -> None:
        """Forget gradients that were sent and sums that were not used."""
        self._sent.clear()
        self._sums.clear()
        self.exchange.abandon()

    def state_dict(self) -> dict[str, Any]:
        """Sums that coming updates use."""
        # What is on its way is received now: after a resume, nobody sends it again.
        while self._sent:
            self._receive_oldest()
        return {"versions": list(self._sums), "sums": list(self._sums.values())}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Restore :meth:`state_dict`; None: no gradient is in transit."""
        while self._sent:
            self._receive_oldest()
        state = state or {"versions": [], "sums": []}
        self._sums = {v: g.to(self.optimized.device).clone() for v, g in zip(state["versions"], state["sums"], strict=True)}


@dataclass(frozen=True)
class TieOnStage:
    """A tied weight as given to stage ``k``: which parameter it is, and how to reach the other holders."""

    tie: Tied
    k: int
    exchange: GradientExchange

    def on(
        self, module: nn.Module, optimized: Sequence[Tensor], params: Sequence[Tensor], program: Program
    ) -> TiedWeight | None:
        """The stage's copy; ``optimized``: what the optimizer moves, in the order of the module's ``params``. None if it moves another.

        Raises:
            ConfigError: the module has no such parameter.
        """
        name = self.tie.name_on(self.k)
        parameter = _named_parameter(module, name)
        if parameter is None:
            raise ConfigError(
                f"tied names {name!r} of stage {self.k}, which has no such parameter; see stage.named_parameters()"
            )
        found = next((h for h, p in zip(optimized, params, strict=True) if p is parameter), None)
        if found is None:
            return None
        holders = self.tie.holders
        delay, counted = common_delay(program, holders), self.k == holders[0]
        return TiedWeight(name, parameter, found, self.exchange, delay, holders, counted)


def _named_parameter(module: nn.Module, name: str) -> Tensor | None:
    """The parameter ``name`` of a stage or, where this is wrapped, of the stage inside."""
    for part in (module, *(inner for _, inner, _ in find_origins(module))):
        # With duplicates: a weight that is also tied inside the stage may be named by either of its names.
        found = dict(part.named_parameters(remove_duplicate=False)).get(name)
        if found is not None:
            return found
    return None


def describe_tied(weight: TiedWeight | None, optimizer: Optimizer | None, scheduler: LRScheduler | None) -> str:
    """Everything that decides how an update moves a stage's copy, as text that must be equal on all holders."""
    if weight is None or optimizer is None:
        return "nothing that moves it"
    optimized, found = weight.optimized, "nothing"
    # An optimizer that combines others: the settings that count are those of the one that moves the weight.
    for member in members(optimizer):
        for group in member.param_groups:
            if any(p is optimized for p in group["params"]):
                options = (f"{name}={_plain_value(group[name])}" for name in sorted(group) if name not in _PER_STAGE_KEYS)
                found = f"{type(member).__name__}({', '.join(options)})"
                if isinstance(member, DelayCompensation):
                    found += f" for a gap of {member.known_gap:g}"
    rate = "" if scheduler is None else f" with {type(scheduler).__name__}"
    shape = f"{str(weight.parameter.dtype).removeprefix('torch.')} {list(weight.parameter.shape)}"
    return f"{found}{rate} on {shape}"


_PER_STAGE_KEYS = ("params", "param_names", "initial_lr", "prediction")


def _plain_value(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value


def check_tied_equal(tie: Tied, described: Sequence[str]) -> None:
    """``described``: by each of the holders.

    Raises:
        ConfigError: they differ.
    """
    for k, words in zip(tie.holders, described, strict=True):
        if words != described[0]:
            raise ConfigError(
                f"the tied weight {tie} has {described[0]} on stage {tie.holders[0]} and {words} on stage {k}, so its copies would "
                "diverge; give both the same optimizer, settings and learning rate"
            )
