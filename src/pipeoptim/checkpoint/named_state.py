"""The state of a stage by the names of the original model, so that stages that are cut elsewhere can take it over.

What belongs to a parameter (the weight, its float32 master, its optimizer state, the options of its param group, what a predictor
remembers of it) is named by it and goes wherever the parameter goes. What belongs to a param group of a scheduler follows the group.
What belongs to a stage (its random stream, what its clipping and compression remember, gradients of tied weights on their way)
returns only to a stage of the same weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pipeoptim.checkpoint.carried_optimizer import carried_optimizer, collect_optimizer, parameter_names
from pipeoptim.checkpoint.carried_predictor import carried_loss_scale, joined_predictor, split_predictor
from pipeoptim.checkpoint.carried_scheduler import SavedScheduler, carried_scheduler, check_scheduler_kept
from pipeoptim.checkpoint.parameter_names import saved_name
from pipeoptim.checkpoint.plain_data import flatten, rebuild, tensors_in
from pipeoptim.engine.stage.worker import StageWorker
from pipeoptim.errors import ConfigError

OF_THE_STAGE = ("random", "most_copies", "clip", "scaling", "compress", "tied", "scale", "skipped", "losses")
"""Entries of ``StageWorker.state_dict`` that make sense for the same cut only (but see the loss scale in :func:`stage_state`)."""


@dataclass
class NamedState:
    """State under original names.

    Attributes:
        tensors: everything large.
        weights: for each stage, the original names of its state_dict.
        optimizer: original name of a parameter -> its optimizer state, plain (see :mod:`.plain_data`).
        groups: stage -> its param groups, each with its class of optimizer, the names of its parameters and its options, plain.
        schedulers: stage -> class and state of its learning-rate scheduler, plain; stages without one are left out.
        predictors: stage -> what its predictor remembers, by parameter, plain; stages without one are left out.
        version: updates applied.
        own: stage -> what makes sense for the same cut only, plain.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[int, list[str]] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    groups: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    schedulers: dict[int, dict[str, Any]] = field(default_factory=dict)
    predictors: dict[int, dict[str, Any]] = field(default_factory=dict)
    version: int = 0
    own: dict[int, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """All but the tensors, as JSON."""
        return {name: value for name, value in vars(self).items() if name != "tensors"}

    def update(self, other: Mapping[str, Any]) -> None:
        """Add what another process has, its :meth:`plain`."""
        for name, value in other.items():
            setattr(self, name, getattr(self, name) | value if isinstance(value, dict) else value)

    def origins(self, names: Collection[str]) -> set[int]:
        """The stages that had some of these weights."""
        return {k for k, own in self.weights.items() if not set(names).isdisjoint(own)}


def collect_stage(worker: StageWorker, found: Mapping[str, str], into: NamedState) -> None:
    """Add the state of one stage at rest; ``found``: name in the stage -> name in the original model."""
    k, state = worker.k, worker.state_dict()
    for name, value in state["module"].items():
        into.tensors[f"model/{found[name]}"] = value.detach()
    into.weights[k] = [found[name] for name in state["module"]]
    into.groups[k] = collect_optimizer(worker, found, into.optimizer, into.tensors)
    into.tensors |= dict(zip(_master_names(worker, found), state.get("masters") or (), strict=True))
    into.version = state["version"]
    if worker.scheduler is not None:
        plain = flatten(state["scheduler"], f"scheduler/{k}", into.tensors)
        into.schedulers[k] = {"kind": type(worker.scheduler).__name__, "state": plain}
    if state["predictor"] is not None:
        split = split_predictor(state["predictor"], parameter_names(worker, found))
        into.predictors[k] = flatten(split, f"predictor/{k}", into.tensors)
    own = {name: state[name] for name in OF_THE_STAGE if name in state}
    into.own[k] = flatten(own, f"stage/{k}", into.tensors)


def stage_state(worker: StageWorker, found: Mapping[str, str], saved: NamedState, same_cut: bool, depth: int) -> dict[str, Any]:
    """The state of a stage as ``StageWorker.load_state_dict`` takes it, from what :func:`collect_stage` found on whatever stages.

    Args:
        depth: of the pipeline that the stage is of.

    Raises:
        ConfigError: optimizer or scheduler are others, or what the stage's parameters were trained with cannot be brought together.
    """
    # The worker's own state as a template: what the checkpoint says nothing of stays as it is.
    state = worker.state_dict()
    state["module"] = {name: saved.tensors[f"model/{original}"] for name, original in found.items()}
    state["optimizer"], sources = carried_optimizer(worker, found, saved.groups, saved.optimizer, saved.tensors)
    schedulers = _schedulers(saved)
    if worker.scheduler is None:
        check_scheduler_kept(worker.k, sources, schedulers)
    else:
        kind = type(worker.scheduler).__name__
        state["scheduler"] = carried_scheduler(worker.k, kind, state["scheduler"], sources, schedulers)
    if worker.master_weights.pairs:
        state["masters"] = [saved.tensors[name] for name in _master_names(worker, found)]
    state["version"] = saved.version
    # The same cut restores everything bit for bit, the loss scale included.
    if same_cut:
        state |= rebuild(saved.own[worker.k], saved.tensors)
    elif worker.scaling is not None:
        scales = {k: rebuild(own["scaling"], {}) for k, own in saved.own.items() if "scaling" in own}
        if scales:
            state["scaling"] = carried_loss_scale(worker.k, depth, saved.origins(found.values()), scales)
    if state["predictor"] is not None:
        state["predictor"] = _predictor_state(worker, found, saved, same_cut, state["predictor"])
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
    for shared in (saved.groups, saved.schedulers):  # a few numbers, of whatever stages
        tensors |= {name for value in shared.values() for name in tensors_in(value)}
    for predictor in saved.predictors.values():
        tensors |= tensors_in(predictor["shared"])
        tensors |= {name for original in found.values() for name in tensors_in(predictor["parameters"].get(original))}
    return tensors | (tensors_in(saved.own[worker.k]) if same_cut else set())


def _schedulers(saved: NamedState) -> dict[int, SavedScheduler | None]:
    return {
        k: SavedScheduler(own["kind"], rebuild(own["state"], saved.tensors), len(saved.groups[k]))
        for k, own in saved.schedulers.items()
    }


def _predictor_state(
    worker: StageWorker, found: Mapping[str, str], saved: NamedState, same_cut: bool, fresh: Mapping[str, Any]
) -> dict[str, Any] | None:
    names = parameter_names(worker, found)
    stages = {worker.k} if same_cut else saved.origins(found.values())
    split = {}
    for k in sorted(stages & saved.predictors.keys()):
        own = {name: values for name, values in saved.predictors[k]["parameters"].items() if name in names}
        split[k] = rebuild({**saved.predictors[k], "parameters": own}, saved.tensors)
    if not split:
        return None  # its memory begins anew
    return joined_predictor(fresh, names, split, same_cut)


def _master_names(worker: StageWorker, found: Mapping[str, str]) -> list[str]:
    """Names of the tensors that hold the stage's masters, in their order."""
    own = {id(p): found[name] for name, p in worker.module.named_parameters()} if worker.master_weights.pairs else {}
    return [f"master/{own[id(p)]}" for _, p in worker.master_weights.pairs]


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
