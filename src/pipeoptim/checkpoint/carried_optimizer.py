"""Optimizer state that moves to other stages: every parameter keeps its own state and the options of its own param group.

Stages may have different learning rates, several param groups, or other groups than before. So options are saved with the names of
the parameters that they belong to, and a group of the new stage gets those of its parameters. Where these disagree there is no group
that could hold them, and loading is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from pipeoptim.checkpoint.plain_data import flatten, rebuild, same_plain
from pipeoptim.engine.stage.master_weights import module_parameter
from pipeoptim.engine.stage.worker import StageWorker
from pipeoptim.errors import ConfigError
from pipeoptim.rules.combined import CombinedOptimizer, members

_OF_THE_PARAMETERS = ("params", "param_names")
"""Entries of a param group that say which parameters it has; the new group has its own."""


@dataclass(frozen=True)
class GroupOrigin:
    """A param group of a saved stage.

    Attributes:
        stage: which one.
        number: of the group among all groups of the stage's optimizer (its members' one after the other).
        kind: class of the optimizer.
        options: plain (see :mod:`.plain_data`).
    """

    stage: int
    number: int
    kind: str
    options: dict[str, Any]

    @property
    def place(self) -> tuple[int, int]:
        """Stage and number."""
        return self.stage, self.number


def parameter_names(worker: StageWorker, found: Mapping[str, str]) -> list[str]:
    """Original names of the stage's parameters in the order of the optimizer's groups."""
    # By identity: the optimizer knows tensors, the module knows names.
    own = {id(p): found[name] for name, p in worker.module.named_parameters()}
    groups = [] if worker.optimizer is None else worker.optimizer.param_groups
    return [own[id(module_parameter(p))] for group in groups for p in group["params"]]


def collect_optimizer(
    worker: StageWorker, found: Mapping[str, str], states: dict[str, Any], tensors: dict[str, Tensor]
) -> list[dict[str, Any]]:
    """The param groups of a stage, plain: ``kind``, ``names`` and ``options`` of each. The state of each parameter goes to ``states``.

    Raises:
        ConfigError: the optimizer keeps state that belongs to no parameter.
    """
    groups: list[dict[str, Any]] = []
    names = iter(parameter_names(worker, found))
    for member, state in _member_states(worker.optimizer):
        kind, numbered = type(member).__name__, []
        for group in state["param_groups"]:
            own = [next(names) for _ in group["params"]]
            numbered += own
            options = {key: value for key, value in group.items() if key not in _OF_THE_PARAMETERS}
            path = f"groups/{worker.k}/{len(groups)}"
            groups.append({"kind": kind, "names": own, "options": flatten(options, path, tensors)})
        for index, values in state["state"].items():
            # torch numbers the state by parameter; any other key belongs to none of them.
            if not isinstance(index, int):
                raise ConfigError(
                    f"{kind} of stage {worker.k} keeps state of its own, {index!r}, that belongs to no weight and cannot "
                    "go to other stages; save stage_state_dict(k) instead, or use another optimizer"
                )
            states[numbered[index]] = flatten(values, f"optimizer/{numbered[index]}", tensors)
    return groups


def group_origins(groups: Mapping[int, list[dict[str, Any]]]) -> dict[str, GroupOrigin]:
    """Original name of a parameter -> the group that it was in."""
    return {
        name: GroupOrigin(k, number, group["kind"], group["options"])
        for k, own in groups.items()
        for number, group in enumerate(own)
        for name in group["names"]
    }


def carried_optimizer(
    worker: StageWorker,
    found: Mapping[str, str],
    groups: Mapping[int, list[dict[str, Any]]],
    states: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, Any] | None, list[list[GroupOrigin]]]:
    """The state of the stage's optimizer, as its ``load_state_dict`` takes it, and for each of its groups where its options are from.

    Args:
        groups: stage -> what :func:`collect_optimizer` returned.
        states, tensors: what it filled.

    Raises:
        ConfigError: another class of optimizer, a parameter that was trained and is not now, or a group whose parameters had
            different options.
    """
    origins = group_origins(groups)
    names = parameter_names(worker, found)
    _check_all_moved(worker, found, set(names), origins)
    remaining = iter(names)
    sources: list[list[GroupOrigin]] = []
    loaded: list[dict[str, Any]] = []
    for member, state in _member_states(worker.optimizer):
        numbered: list[str] = []
        for group in state["param_groups"]:
            own = [next(remaining) for _ in group["params"]]
            numbered += own
            known = [origins[name] for name in own if name in origins]
            _check_kind(worker.k, type(member).__name__, own, origins)
            if not own:  # an empty group has no parameters to follow; with the same cut it is found by its place
                known = _empty_origin(groups.get(worker.k, []), len(sources), worker.k)
            # The new group keeps its "params"; only the options are taken over.
            group |= _common_options(worker.k, len(sources), own, origins, known, tensors)
            # Each place once, in the order of the parameters: the scheduler's entries follow it.
            sources.append(list({origin.place: origin for origin in known}.values()))
        state["state"] = {n: rebuild(states[name], tensors) for n, name in enumerate(numbered) if name in states}
        loaded.append(state)
    if worker.optimizer is None:
        return None, []
    return ({"optimizers": loaded} if isinstance(worker.optimizer, CombinedOptimizer) else loaded[0]), sources


def _member_states(optimizer: Optimizer | None) -> Iterator[tuple[Optimizer, dict[str, Any]]]:
    for member in () if optimizer is None else members(optimizer):
        yield member, member.state_dict()


def _empty_origin(groups: list[dict[str, Any]], number: int, k: int) -> list[GroupOrigin]:
    if number < len(groups) and not groups[number]["names"]:
        return [GroupOrigin(k, number, groups[number]["kind"], groups[number]["options"])]
    return []


def _common_options(
    k: int,
    number: int,
    names: list[str],
    origins: Mapping[str, GroupOrigin],
    known: list[GroupOrigin],
    tensors: Mapping[str, Tensor],
) -> dict[str, Any]:
    """The options of all of ``known``; none where a group has only parameters that nothing moved before."""
    if not known:
        return {}
    first: dict[str, Any] = rebuild(known[0].options, tensors)
    named = [name for name in names if name in origins]
    for name, origin in zip(named, known, strict=False):
        other = rebuild(origin.options, tensors)
        for key in dict.fromkeys([*first, *other]):
            if not same_plain(first.get(key), other.get(key)):
                raise ConfigError(
                    f"param group {number} of stage {k} has {named[0]!r} and {name!r}, which were trained with {key}={_shown(first, key)} "
                    f"and {key}={_shown(other, key)}; give the optimizer of stage {k} a param group for each, or cut the model elsewhere"
                )
    return first


def _shown(options: Mapping[str, Any], key: str) -> str:
    return repr(options[key]) if key in options else "nothing"


def _check_all_moved(worker: StageWorker, found: Mapping[str, str], now: set[str], origins: Mapping[str, GroupOrigin]) -> None:
    left = [name for name in dict.fromkeys(found.values()) if name in origins and name not in now]
    if left:
        raise ConfigError(
            f"none of the param groups of stage {worker.k} has {left[0]!r}, which {origins[left[0]].kind} moved when the checkpoint was "
            f"saved ({len(left)} such weights); make the optimizer as it was made then (requires_grad=False freezes a weight that it has)"
        )


def _check_kind(k: int, kind: str, names: list[str], origins: Mapping[str, GroupOrigin]) -> None:
    for name in names:
        before = origins[name].kind if name in origins else kind
        if before != kind:
            raise ConfigError(
                f"the checkpoint has the state of {before} for {name!r}, but stage {k} moves it by {kind}; make the optimizer as it was "
                "made when saved, or start a new one from weights alone with save_weights and load_weights"
            )
