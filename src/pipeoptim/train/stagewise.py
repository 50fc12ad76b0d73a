"""Models whose weights come stage by stage, so that no process ever holds the whole model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from pipeoptim.engine.stage.origin import find_origins, note_origins
from pipeoptim.errors import ConfigError
from pipeoptim.partitioning.layer_stage import LayerStage
from pipeoptim.partitioning.weight_slots import is_meta, weight_slots


@dataclass(frozen=True)
class StagewiseModel:
    """What a function that ``--model`` names may return in place of a module: its form now, its weights later and in parts.

    Args:
        skeleton: the model on the ``meta`` device, which is cut between its layers.
        read: called once per process with the names in the skeleton of what its stages hold; returns the values of these parameters and
            buffers, whichever others it is asked for. torch's random numbers are seeded with the run's seed.
        before_export: called with each stage after training, before its weights are written, which it may change.
        sizes: what it has room for, by the name that tasks have for it: ``vocab_size``, ``context``.
    """

    skeleton: nn.Module
    read: Callable[[Collection[str]], Mapping[str, Tensor]]
    before_export: Callable[[nn.Module], None] | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not is_meta(self.skeleton):
            raise ConfigError(f"the skeleton is a {type(self.skeleton).__name__} with values, must be made on the meta device")

    def fill(self, stages: Sequence[nn.Module]) -> None:
        """Give ``stages``, which were cut from the skeleton, their values.

        Raises:
            ConfigError: one is missing, or has another shape.
        """
        # A weight that a stage uses twice is one tensor in two slots, and stays one.
        places = [(_name(stage, slot.names[0]), slot) for stage in stages for slot in weight_slots(stage)]
        found = self.read({name for name, _ in places})
        made: dict[int, Tensor] = {}
        taken: set[int] = set()  # memory of a tied weight, of which each stage has a copy of its own: stages share nothing
        for name, slot in places:
            form = slot.tensor
            if id(form) not in made:
                value = found.get(name)
                if value is None or value.shape != form.shape:
                    has = "no value" if value is None else f"shape {list(value.shape)}"
                    raise ConfigError(
                        f"{name} has {has}, must be of shape {list(form.shape)}; are these weights of this model?"
                    )
                value = value.detach().to(form.dtype, copy=value.untyped_storage().data_ptr() in taken)
                taken.add(value.untyped_storage().data_ptr())
                made[id(form)] = value if slot.buffer else nn.Parameter(value, requires_grad=form.requires_grad)
            slot.put(made[id(form)])
        for stage in stages:  # what a stage knows of the others' weights is their form, and the device where they are
            stage._apply(lambda t: torch.empty_like(t, device="cpu") if t.is_meta else t)  # type: ignore[no-untyped-call]

    def whole(self) -> nn.Module:
        """The skeleton with all its values."""
        self.fill([self.skeleton])
        return self.skeleton

    def prepare_export(self, stages: Iterable[nn.Module]) -> None:
        """What is to be done with ``stages`` before their weights are written; afterwards they can only be written."""
        if self.before_export is None:
            return
        for stage in stages:
            self.before_export(stage)
            for _, module, origin in find_origins(stage):
                own = module.state_dict()
                kept = {name: place for name, place in (origin.names or {}).items() if place in own}
                added = {_name(module, place): place for place in own if place not in kept.values()}
                note_origins([module], [replace(origin, names={**kept, **added})])


def _name(stage: nn.Module, own: str) -> str:
    """The name in the model of what a stage calls ``own``."""
    return own.removeprefix("model.") if isinstance(stage, LayerStage) else own


def without_values(stage: nn.Module) -> bool:
    """Whether ``stage`` is still to be filled."""
    return any(t.is_meta for t in (*stage.parameters(), *stage.buffers()))
