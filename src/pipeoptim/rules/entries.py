"""The parameters of an optimizer, each with its rule and its kind of prediction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from pipeoptim.errors import ConfigError
from pipeoptim.optim import DelayCompensation
from pipeoptim.rules.checks import check_group, check_kind
from pipeoptim.rules.combined import CHEAPEST, members
from pipeoptim.rules.move import Group, State, as_real
from pipeoptim.rules.registry import KINDS, RULE_KINDS, Rule, find_rule
from pipeoptim.rules.scratch import can_scratch_step


@dataclass(frozen=True, slots=True)
class ParameterEntry:
    """One parameter, with what moves it.

    Attributes:
        number: its place among all parameters.
        weight: what is predicted: the parameter, or the shard of it that this process holds.
        parameter: the parameter as the optimizer knows it.
        group_number: place of its param group among all groups.
        kind: how it is predicted: as its param group says in an entry "prediction", else as asked; "displacement" where there is
            no rule.
    """

    number: int
    weight: Tensor
    parameter: Tensor
    optimizer: Optimizer
    group: Group
    group_number: int
    rule: Rule | None
    kind: str

    @property
    def state(self) -> State:
        """What the optimizer remembers of this parameter; empty before its first update."""
        state: State = self.optimizer.state.get(self.parameter, {})
        return state if self.parameter is self.weight else {name: local_shard(value) for name, value in state.items()}

    @property
    def in_progress(self) -> bool:
        """Whether it is predicted from the mini-batch in progress."""
        return KINDS[self.kind].in_progress

    @property
    def real_weight(self) -> Tensor:
        """The weight as rules see it: detached, a complex one as pairs of reals."""
        return as_real(self.weight.detach())

    @property
    def real_state(self) -> State:
        """The state as rules see it."""
        state = self.state
        if not self.weight.is_complex():
            return state
        return {name: as_real(value) if isinstance(value, Tensor) else value for name, value in state.items()}

    @property
    def needs_grad(self) -> bool:
        """Whether its prediction needs the last gradient."""
        known = self.kind in RULE_KINDS and not self.in_progress  # which has gradients of its own
        return known and self.rule is not None and self.rule.needs_grad(self.group, self.kind)


def local_shard(value: Any) -> Any:
    """The shard of a distributed tensor in this process; anything else as it is."""
    return value.to_local() if hasattr(value, "to_local") else value


def parameter_entries(
    optimizer: Optimizer, kind: str, shards: Mapping[Tensor, Tensor] = MappingProxyType({})
) -> list[ParameterEntry]:
    """All parameters in param_groups order: the order of every list of weights in this package.

    Args:
        optimizer, kind: see `predict_weights`.
        shards: what this process holds of a parameter, where that is not all of it.

    Raises:
        ConfigError: an unknown kind, one that an optimizer does not offer, or an optimizer that cannot be predicted.
    """
    entries: list[ParameterEntry] = []
    group_number = 0
    for member in members(optimizer):
        rule = find_rule(member)
        for group in member.param_groups:
            chosen = _kind_of(member, group, kind, rule, sharded=bool(shards))
            for p in group["params"]:
                weight = shards.get(p, p)
                entries.append(ParameterEntry(len(entries), weight, p, member, group, group_number, rule, chosen))
            group_number += 1
    return entries


def _kind_of(optimizer: Optimizer, group: Group, kind: str, rule: Rule | None, sharded: bool) -> str:
    """The kind by which a param group is predicted."""
    wanted: str = group.get("prediction", kind)
    if isinstance(wanted, str) and wanted == CHEAPEST:
        wanted = kind if kind in KINDS and KINDS[kind].in_progress else "displacement"
    check_kind(wanted, rule, optimizer)
    check_group(group)
    if KINDS[wanted].in_progress and isinstance(optimizer, DelayCompensation):
        raise ConfigError(
            f"prediction 'in_progress' knows the steps of {type(optimizer.optimizer).__name__}, not as {type(optimizer).__name__} corrects "
            "them; choose 'refined' or 'displacement'"
        )
    chosen = wanted
    if rule is None and wanted in RULE_KINDS:  # in progress by the optimizer's own step
        if KINDS[wanted].in_progress and sharded:
            raise ConfigError(
                f"{type(optimizer).__name__} has no prediction rule, so it is unknown whether it moves each element by itself, and this "
                'process holds a shard; use prediction="displacement"'
            )
        chosen = wanted if KINDS[wanted].in_progress and can_scratch_step(optimizer) else "displacement"
    if sharded and rule is not None and chosen in RULE_KINDS and not rule.elementwise:
        raise ConfigError(
            f"{type(optimizer).__name__} moves each matrix as a whole, of which this process holds a shard; "
            'use prediction="displacement"'
        )
    return chosen


def optimizer_parameters(optimizer: Optimizer) -> list[Tensor]:
    """All parameters in param_groups order."""
    return [weight for group in optimizer.param_groups for weight in group["params"]]


@dataclass(frozen=True, slots=True)
class EntrySet:
    """The entries of one optimizer.

    Attributes:
        all: of every parameter.
        one_per_group: a parameter of each group that has any: kind and options are the group's, so one stands for all.
        displaced: those that are predicted by their last displacement.
        in_progress: whether any is predicted from the mini-batch in progress.
    """

    all: list[ParameterEntry]
    one_per_group: list[ParameterEntry]
    displaced: list[ParameterEntry]
    in_progress: bool = False

    @property
    def kinds(self) -> list[str]:
        """The kind of each param group that has parameters."""
        return [entry.kind for entry in self.one_per_group]

    @property
    def need_grad(self) -> bool:
        """Whether the prediction of any needs the last gradient; options of a group may change, so it is asked anew."""
        return any(entry.needs_grad for entry in self.one_per_group)


class EntryTable:
    """The entries of one optimizer, kept from update to update and built anew when its param groups change.

    Args:
        optimizer, kind, shards: see `parameter_entries`.
    """

    def __init__(self, optimizer: Optimizer, kind: str, shards: Mapping[Tensor, Tensor]) -> None:
        self._optimizer, self._kind, self._shards = optimizer, kind, shards
        self._entries = EntrySet([], [], [])
        self._built_from: list[tuple[Any, ...]] | None = None
        self.current()  # refuses what cannot be predicted

    def current(self) -> EntrySet:
        """The same object as before unless a param group was added, replaced or given another kind."""
        groups = self._optimizer.param_groups
        built_from = [(id(group), id(group["params"]), len(group["params"]), group.get("prediction")) for group in groups]
        if self._built_from != built_from:
            entries = parameter_entries(self._optimizer, self._kind, self._shards)
            one_per_group = list({entry.group_number: entry for entry in entries}.values())
            # Whole numbers are not trained, so they never move: whoever holds the buffers copies them.
            moving = [entry for entry in entries if entry.weight.is_floating_point() or entry.weight.is_complex()]
            displaced = [entry for entry in moving if entry.kind == "displacement"]
            in_progress = any(entry.in_progress for entry in one_per_group)
            self._entries = EntrySet(entries, one_per_group, displaced, in_progress)
            self._built_from = built_from
        return self._entries
