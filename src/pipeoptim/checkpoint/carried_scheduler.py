"""State of learning-rate schedulers that moves to other stages: entries per param group follow their group.

A scheduler has entries of its own (``last_epoch``, ``T_max``), which all stages that give parameters to a new stage must agree on,
and lists with one entry per param group of its optimizer (``base_lrs``), which are put together anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeoptim.checkpoint.carried_optimizer import GroupOrigin
from pipeoptim.checkpoint.plain_data import same_plain
from pipeoptim.errors import ConfigError

PER_GROUP = ("base_lrs", "_last_lr", "lr_lambdas", "max_lrs", "min_lrs", "base_momentums", "max_momentums")
"""What torch's own schedulers have one of for each param group."""

WHOLE = ("_schedule_phases", "_milestones")
"""Lists of torch's own schedulers that have nothing to do with param groups, however many entries they have."""


@dataclass(frozen=True)
class SavedScheduler:
    """The scheduler of a saved stage: its class, its state, and the number of param groups of its optimizer."""

    kind: str
    state: dict[str, Any]
    groups: int


def carried_scheduler(
    k: int,
    kind: str,
    fresh: dict[str, Any],
    sources: Sequence[Sequence[GroupOrigin]],
    saved: Mapping[int, SavedScheduler | None],
) -> dict[str, Any]:
    """The state of the scheduler of stage ``k``, as its ``load_state_dict`` takes it; its own ``fresh`` one where none was saved.

    Args:
        kind: its class.
        fresh: its present state.
        sources: for each param group of the stage, where its parameters were.
        saved: stage -> its scheduler.

    Raises:
        ConfigError: the stages that the parameters come from had schedulers of different classes or in different states, or
            another one than this.
    """
    stages = sorted({origin.stage for origins in sources for origin in origins})
    found = {stage: saved.get(stage) for stage in stages}
    there = {stage: scheduler for stage, scheduler in found.items() if scheduler is not None}
    if not there:
        return fresh
    kinds = {stage: "no scheduler" if scheduler is None else scheduler.kind for stage, scheduler in found.items()}
    for stage, other in kinds.items():
        if other != kind:
            raise ConfigError(
                f"stage {k} has {kind}, but its weights were trained with {other} (on stage {stage}); make the scheduler as it was "
                "made when saved, or cut the model elsewhere"
            )
    counts = {stage: scheduler.groups for stage, scheduler in there.items()}
    merge = _Merge(k, kind, [[origin.place for origin in origins] for origins in sources], counts)
    return merge.states(fresh, {stage: scheduler.state for stage, scheduler in there.items()})


def check_scheduler_kept(k: int, sources: Sequence[Sequence[GroupOrigin]], saved: Mapping[int, SavedScheduler | None]) -> None:
    """Raises ConfigError where a stage without a scheduler has parameters that were trained with one."""
    for stage in sorted({origin.stage for origins in sources for origin in origins}):
        scheduler = saved.get(stage)
        if scheduler is not None:
            raise ConfigError(
                f"stage {k} has no scheduler, but its weights were trained with {scheduler.kind} (on stage {stage}); make it as it was "
                "made when saved"
            )


@dataclass(frozen=True)
class _Merge:
    """From the states of several stages' schedulers to that of stage ``k``; ``places``: per group, those it comes from."""

    k: int
    kind: str
    places: list[list[tuple[int, int]]]
    counts: dict[int, int]

    def states(self, fresh: Mapping[str, Any], states: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
        keys = dict.fromkeys(key for state in states.values() for key in state)
        return {
            key: self._value(key, fresh.get(key), {stage: state.get(key) for stage, state in states.items()}) for key in keys
        }

    def _value(self, key: str, fresh: Any, values: dict[int, Any]) -> Any:
        first = next(iter(values.values()))
        alike = all(same_plain(first, value) for value in values.values())
        if key == "_schedulers":  # of SequentialLR and ChainedScheduler: states of their own
            return [self.states(own, {stage: v[n] for stage, v in values.items()}) for n, own in enumerate(fresh)]
        lengths_fit = all(isinstance(value, list) and len(value) == self.counts[stage] for stage, value in values.items())
        if key not in WHOLE and lengths_fit and isinstance(fresh, list) and len(fresh) == len(self.places):
            regrouped = self._regrouped(key, fresh, values)
            whole = alike and len(first) == len(fresh) and key not in PER_GROUP
            if whole and not same_plain(first, regrouped):  # as many entries as there are groups: by chance, or for them?
                if same_plain(first, fresh):
                    return first
                if not same_plain(regrouped, fresh):
                    raise self._refusal(key, "may or may not belong to its param groups, which are others now")
            return regrouped
        if not alike:
            shown = ", ".join(f"{value!r} on stage {stage}" for stage, value in values.items())
            raise self._refusal(key, f"was {shown}, and its weights come from all of these")
        # JSON has made a dictionary of MultiStepLR's milestones.
        return Counter(first) if isinstance(fresh, Counter) else first

    def _regrouped(self, key: str, fresh: list[Any], values: Mapping[int, list[Any]]) -> list[Any]:
        made = []
        for own, places in zip(fresh, self.places, strict=True):
            entries = [values[stage][number] for stage, number in places]
            if any(not same_plain(entries[0], entry) for entry in entries):
                raise self._refusal(key, f"differs between the param groups that one of its groups comes from ({entries!r})")
            made.append(entries[0] if entries else own)  # a group of new parameters has no other entry than its own
        return made

    def _refusal(self, key: str, why: str) -> ConfigError:
        return ConfigError(
            f"{key!r} of the {self.kind} of stage {self.k} {why}; cut the model where it was cut, or give each stage schedulers and "
            "param groups that were saved alike"
        )
