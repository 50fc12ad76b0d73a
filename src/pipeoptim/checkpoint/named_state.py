"""The state of a stage by the names of the original model, so that stages that are cut elsewhere can take it over.

What belongs to a weight (the weight, its optimizer state, its float32 master) is named by it and goes wherever the weight goes.
What belongs to a pipeline (version, learning-rate schedule, options of param groups) is the same on all stages. What belongs to
a stage (its random stream, what its predictor, clipping and compression remember, gradients of tied weights on their way) returns only
to a stage of the same weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from pipeoptim.checkpoint.parameter_names import saved_name
from pipeoptim.checkpoint.plain_data import flatten, rebuild, tensors_in
from pipeoptim.engine.stage.master_weights import module_parameter
from pipeoptim.engine.stage.worker import StageWorker
from pipeoptim.errors import ConfigError
from pipeoptim.rules.combined import CombinedOptimizer, members

OF_THE_STAGE = ("random", "predictor", "clip", "scaling", "compress", "tied")
"""Entries of ``StageWorker.state_dict`` that make sense for the same cut only."""


@dataclass
class NamedState:
    """State under original names.

    Attributes:
        tensors: everything large.
        weights: for each stage, the original names of its state_dict.
        optimizer: original name of a parameter -> its optimizer state, plain (see :mod:`.plain`).
        groups: options of the param groups of each optimizer of a stage, without their parameters.
        kinds: original name of a parameter -> class of the optimizer that moves it.
        scheduler: state of the learning-rate scheduler, plain.
        version: updates applied.
        own: stage -> what makes sense for the same cut only, plain.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[int, list[str]] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    groups: list[list[dict[str, Any]]] = field(default_factory=list)
    kinds: dict[str, str] = field(default_factory=dict)
    scheduler: Any = None
    version: int = 0
    own: dict[int, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """All but the tensors, as JSON."""
        return {name: value for name, value in vars(self).items() if name != "tensors"}


def collect_stage(worker: StageWorker, found: Mapping[str, str], into: NamedState) -> None:
    """Add the state of one stage at rest; ``found``: name in the stage -> name in the original model."""
    k, state = worker.k, worker.state_dict()
    for name, value in state["module"].items():
        into.tensors[f"model/{found[name]}"] = value.detach()
    into.weights[k] = [found[name] for name in state["module"]]
    _collect_optimizer(worker, found, into)
    into.tensors |= dict(zip(_master_names(worker, found), state.get("masters") or (), strict=True))
    into.version = state["version"]
    into.scheduler = flatten(state["scheduler"], "scheduler", into.tensors) or into.scheduler
    own = {name: state[name] for name in OF_THE_STAGE if name in state}
    into.own[k] = flatten(own, f"stage/{k}", into.tensors)


def stage_state(worker: StageWorker, found: Mapping[str, str], saved: NamedState, same_cut: bool) -> dict[str, Any]:
    """The state of a stage as ``StageWorker.load_state_dict`` takes it, from what :func:`collect_stage` found on whatever stages.

    Raises:
        ConfigError: a weight or its optimizer state is not in ``saved``, or the optimizer is another one or has other param groups.
    """
    state = worker.state_dict()
    state["module"] = {name: saved.tensors[f"model/{original}"] for name, original in found.items()}
    if worker.optimizer is not None:
        state["optimizer"] = _optimizer_state(worker, found, saved)
    if worker.master_weights.pairs:
        state["masters"] = [saved.tensors[name] for name in _master_names(worker, found)]
    state["version"] = saved.version
    if worker.scheduler is not None and saved.scheduler is not None:
        state["scheduler"] = rebuild(saved.scheduler, saved.tensors)
    if same_cut:
        state |= rebuild(saved.own[worker.k], saved.tensors)
    else:
        state["predictor"] = None  # its memory begins anew
    return state


def tensors_needed(worker: StageWorker, found: Mapping[str, str], saved: NamedState, same_cut: bool) -> set[str]:
    """The tensors that :func:`stage_state` will ask for.

    Raises:
        ConfigError: the checkpoint lacks some of the stage's weights.
    """
    known = {name for part in saved.weights.values() for name in part}
    missing = [name for name in found.values() if name not in known]
    if missing:
        raise ConfigError(
            f"the checkpoint lacks {len(missing)} weights of stage {worker.k} (first: {missing[0]!r}); it is of another model, "
            "or names differ from those that it was saved with"
        )
    tensors = {f"model/{original}" for original in found.values()}
    tensors |= {name for original in found.values() for name in tensors_in(saved.optimizer.get(original))}
    tensors |= set(_master_names(worker, found))
    tensors |= tensors_in(saved.scheduler)
    tensors |= {name for groups in saved.groups for name in tensors_in(groups)}
    return tensors | (tensors_in(saved.own[worker.k]) if same_cut else set())


def _by_parameter(worker: StageWorker, found: Mapping[str, str]) -> dict[int, str]:
    """Identity of a parameter of the stage -> its original name."""
    return {id(p): found[name] for name, p in worker.module.named_parameters()}


def _master_names(worker: StageWorker, found: Mapping[str, str]) -> list[str]:
    """Names of the tensors that hold the stage's masters, in their order."""
    own = _by_parameter(worker, found) if worker.master_weights.pairs else {}
    return [f"master/{own[id(p)]}" for _, p in worker.master_weights.pairs]


def _numbered_names(worker: StageWorker, optimizer: Optimizer, found: Mapping[str, str]) -> list[str]:
    """Original names in the optimizer's own numbering."""
    own = _by_parameter(worker, found)
    return [own[id(module_parameter(p))] for group in optimizer.param_groups for p in group["params"]]


def _member_states(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [member.state_dict() for member in members(optimizer)]


def _collect_optimizer(worker: StageWorker, found: Mapping[str, str], into: NamedState) -> None:
    if worker.optimizer is None:
        return
    groups = []
    for n, (member, state) in enumerate(zip(members(worker.optimizer), _member_states(worker.optimizer), strict=True)):
        numbered = _numbered_names(worker, member, found)
        into.kinds |= dict.fromkeys(numbered, type(member).__name__)
        for index, values in state["state"].items():
            if not isinstance(index, int):
                raise ConfigError(
                    f"{type(member).__name__} of stage {worker.k} keeps state of its own, {index!r}, that belongs to no weight and cannot "
                    "go to other stages; save stage_state_dict(k) instead, or use another optimizer"
                )
            name = numbered[index]
            into.optimizer[name] = flatten(values, f"optimizer/{name}", into.tensors)
        options = [{key: v for key, v in group.items() if key != "params"} for group in state["param_groups"]]
        groups.append([flatten(group, f"groups/{n}/{j}", into.tensors) for j, group in enumerate(options)])
    into.groups = into.groups or groups


def _optimizer_state(worker: StageWorker, found: Mapping[str, str], saved: NamedState) -> dict[str, Any]:
    assert worker.optimizer is not None
    states = _member_states(worker.optimizer)
    if [len(groups) for groups in saved.groups] != [len(state["param_groups"]) for state in states]:
        raise ConfigError(
            f"the checkpoint has optimizers with {[len(groups) for groups in saved.groups]} param groups, stage {worker.k} with "
            f"{[len(state['param_groups']) for state in states]}; make the optimizer as it was made when saved"
        )
    for member, state, groups in zip(members(worker.optimizer), states, saved.groups, strict=True):
        numbered = _numbered_names(worker, member, found)
        _check_kinds(worker.k, type(member).__name__, numbered, saved)
        there = [(n, saved.optimizer[name]) for n, name in enumerate(numbered) if name in saved.optimizer]
        state["state"] = {n: rebuild(values, saved.tensors) for n, values in there}
        for group, options in zip(state["param_groups"], groups, strict=True):
            group |= rebuild(options, saved.tensors)
    return {"optimizers": states} if isinstance(worker.optimizer, CombinedOptimizer) else states[0]


def _check_kinds(k: int, kind: str, names: list[str], saved: NamedState) -> None:
    for name in names:
        before = saved.kinds.get(name, kind)  # checkpoints of before this was noted say nothing
        if before != kind:
            raise ConfigError(
                f"the checkpoint has the state of {before} for {name!r}, but stage {k} moves it by {kind}; make the optimizer as it was "
                "made when saved, or start a new one from weights alone with save_weights and load_weights"
            )


def check_covered(names_of: Iterable[Collection[str]], saved: NamedState) -> None:
    """``names_of``: original names of the weights of every stage.

    Raises:
        ConfigError: ``saved`` has weights that no stage has.
    """
    have = {name for names in names_of for name in names}
    known = {name for names in saved.weights.values() for name in names}
    extra = sorted(name for name in known if saved_name(name, have) not in have)
    if extra:
        raise ConfigError(
            f"the checkpoint has {len(extra)} weights that no stage has (first: {extra[0]!r}); it is of another model, or names differ "
            "from those that it was saved with"
        )
